"""Optimizers by name against torch's and transformers' own, layer by layer, over 30 steps."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import transformers
from flax import nnx

from fastjax.train.optimizers import ALIASES, DIRECTIONS, make_optimizer, resolve_name
from fastjax.train.param_rules import is_decayed, is_hidden_matrix, is_stacked, names
from fastjax.train.schedules import make_schedule

STEPS = 30
LAYERS = 3
# One stacked LoRA factor, one stacked norm, one plain matrix, one vector, and an embedding.
SHAPES = {
    "layers.q_proj.lora.a": (LAYERS, 24, 8),
    "layers.input_layernorm.weight": (LAYERS, 24),
    "classifier.weight": (12, 20),
    "classifier.bias": (12,),
    "embed_tokens.weight": (30, 24),
}


def start(seed=0):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(scale=0.3, size=shape).astype(np.float32) for name, shape in SHAPES.items()}


def noise(step):
    """The part of a gradient that does not depend on the parameters; its size varies over three decades."""
    rng = np.random.default_rng(1000 + step)
    return {
        name: (10 ** rng.uniform(-2, 1, shape) * rng.normal(size=shape)).astype(np.float32)
        for name, shape in SHAPES.items()
    }


def run_ours(optimizer, params, steps=STEPS):
    @jax.jit
    def step(params, state, extra):
        grads = jax.tree.map(lambda p, e: 0.1 * p + e, params, extra)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = jax.tree.map(jnp.asarray, params)
    state = optimizer.init(params)
    for i in range(steps):
        params, state = step(params, state, noise(i))
    return jax.tree.map(np.asarray, params)


def unstacked(tree):
    """One tensor a layer, as a Hugging Face model has them."""
    return {
        (name, layer): value
        for name, stack in tree.items()
        for layer, value in enumerate(stack if name.startswith("layers.") else [stack])
    }


def run_torch(make, params, steps=STEPS, max_grad_norm=None):
    tensors = {key: torch.nn.Parameter(torch.tensor(value)) for key, value in unstacked(params).items()}
    decayed = [tensor for (name, _), tensor in tensors.items() if "bias" not in name and "norm" not in name]
    spared = [tensor for (name, _), tensor in tensors.items() if "bias" in name or "norm" in name]
    optimizer = make([{"params": decayed}, {"params": spared, "weight_decay": 0.0}])
    for i in range(steps):
        for key, extra in unstacked(noise(i)).items():
            tensors[key].grad = 0.1 * tensors[key].detach() + torch.tensor(extra)
        if max_grad_norm:
            torch.nn.utils.clip_grad_norm_(list(tensors.values()), max_grad_norm)
        optimizer.step()
    return {
        name: np.stack([tensor.detach().numpy() for (n, _), tensor in tensors.items() if n == name])
        if name.startswith("layers.")
        else tensors[name, 0].detach().numpy()
        for name in params
    }


def assert_close(ours, theirs, **tolerance):
    for name in SHAPES:
        np.testing.assert_allclose(ours[name], theirs[name], err_msg=name, **tolerance)


@pytest.mark.parametrize(
    ("betas", "eps", "decay"), [((0.9, 0.999), 1e-8, 0.0), ((0.8, 0.95), 1e-3, 0.1), ((0.0, 0.99), 1e-6, 0.01)]
)
def test_adamw_equals_torch(betas, eps, decay):
    ours = make_optimizer(
        "adamw",
        1e-2,
        weight_decay=decay,
        adam_beta1=betas[0],
        adam_beta2=betas[1],
        adam_epsilon=eps,
        max_grad_norm=None,
    )
    theirs = run_torch(lambda p: torch.optim.AdamW(p, lr=1e-2, betas=betas, eps=eps, weight_decay=decay), start())
    assert_close(run_ours(ours, start()), theirs, rtol=1e-6, atol=1e-6)


def test_sgd_equals_torch():
    ours = make_optimizer("sgd", 1e-2, weight_decay=0.1, max_grad_norm=None)
    theirs = run_torch(lambda p: torch.optim.SGD(p, lr=1e-2, weight_decay=0.1), start())
    assert_close(run_ours(ours, start()), theirs, rtol=0, atol=1e-6)


def test_lion_equals_its_formula():
    rate, b1, b2, decay = 1e-3, 0.9, 0.98, 0.1
    expected = {name: value.astype(np.float64) for name, value in start().items()}
    momentum = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    for i in range(STEPS):
        for name, extra in noise(i).items():
            p, m, g = expected[name], momentum[name], 0.1 * expected[name] + extra
            wd = 0 if "bias" in name or "norm" in name else decay
            expected[name] = p - rate * (np.sign(b1 * m + (1 - b1) * g) + wd * p)
            momentum[name] = b2 * m + (1 - b2) * g
    ours = make_optimizer("lion", rate, weight_decay=decay, adam_beta1=b1, adam_beta2=b2, max_grad_norm=None)
    assert_close(run_ours(ours, start()), expected, rtol=0, atol=1e-6)


def test_adafactor_equals_transformers_on_each_layer():
    def theirs(params):
        return transformers.Adafactor(params, lr=1e-2, weight_decay=0.1, scale_parameter=False, relative_step=False)

    ours = make_optimizer("adafactor", 1e-2, weight_decay=0.1, max_grad_norm=None)
    assert_close(run_ours(ours, start()), run_torch(theirs, start()), rtol=0, atol=2e-6)


def test_adafactor_keeps_one_number_a_row_and_a_column():
    state = make_optimizer("adafactor", 1e-2).init({"layers.q_proj.lora.a": jnp.zeros((2, 4096, 16))})
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) < 2 * (4096 + 16) + 10


@pytest.mark.parametrize("step", [1, 30])
def test_muon_equals_torch_on_each_matrix(step):
    """The update of one step. Optax corrects the bias of the momentum, which the first few steps after the first show;
    torch iterates in bfloat16: hence the tolerance."""

    def theirs(groups):
        groups = [group | {"params": [p for p in group["params"] if p.ndim == 2]} for group in groups]
        return torch.optim.Muon(groups, lr=1e-2, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")

    ours = make_optimizer("muon", 1e-2, max_grad_norm=None)
    after, before = (run_ours(ours, start(), steps=n) for n in (step, step - 1))
    expected_after, expected_before = (run_torch(theirs, start(), steps=n) for n in (step, step - 1))
    for name in ("layers.q_proj.lora.a", "classifier.weight"):
        update, expected = after[name] - before[name], expected_after[name] - expected_before[name]
        assert np.linalg.norm(update - expected) < 0.02 * np.linalg.norm(expected), name


def test_muon_orthogonalises_each_layer_on_its_own():
    begin = start()
    optimizer = make_optimizer("muon", 1.0, max_grad_norm=None)
    after = run_ours(optimizer, begin, steps=1)["layers.q_proj.lora.a"] - begin["layers.q_proj.lora.a"]
    for layer in range(LAYERS):
        singular = np.linalg.svd(after[layer], compute_uv=False) / (0.2 * 24**0.5)
        assert ((singular > 0.6) & (singular < 1.3)).all(), singular
        alone = {"w": jnp.asarray(begin["layers.q_proj.lora.a"][layer])}
        grads = {"w": 0.1 * alone["w"] + noise(0)["layers.q_proj.lora.a"][layer]}
        update, _ = optimizer.update(grads, optimizer.init(alone), alone)
        np.testing.assert_allclose(after[layer], update["w"], atol=2e-6)


def test_muon_leaves_vectors_and_embeddings_to_adamw():
    ours = run_ours(make_optimizer("muon", 1e-2, weight_decay=0.1, max_grad_norm=None), start())
    adamw = run_ours(make_optimizer("adamw", 1e-2, weight_decay=0.1, max_grad_norm=None), start())
    same = {name for name in SHAPES if np.array_equal(ours[name], adamw[name])}
    assert same == {"layers.input_layernorm.weight", "classifier.bias", "embed_tokens.weight"}


@pytest.mark.parametrize("max_grad_norm", [1.0, 100.0, 1e4])
def test_clipping_equals_torch(max_grad_norm):
    ours = make_optimizer("sgd", 1e-2, max_grad_norm=max_grad_norm)
    theirs = run_torch(lambda p: torch.optim.SGD(p, lr=1e-2), start(), max_grad_norm=max_grad_norm)
    clipped = run_ours(ours, start())
    assert_close(clipped, theirs, rtol=0, atol=2e-6)
    unclipped = run_ours(make_optimizer("sgd", 1e-2, max_grad_norm=None), start())
    assert (clipped["classifier.bias"] == unclipped["classifier.bias"]).all() == (max_grad_norm == 1e4)


def test_schedule_is_read_from_the_first_update_on():
    schedule = make_schedule("linear", 1e-2, warmup_steps=2, total_steps=5)
    ours = make_optimizer("sgd", schedule, max_grad_norm=None)

    def theirs(groups):
        optimizer = torch.optim.SGD(groups, lr=1e-2)
        scheduler = transformers.get_scheduler("linear", optimizer, num_warmup_steps=2, num_training_steps=5)
        optimizer.register_step_post_hook(lambda *_: scheduler.step())
        return optimizer

    assert_close(run_ours(ours, start(), steps=1), start(), rtol=0, atol=0)
    assert_close(run_ours(ours, start(), steps=5), run_torch(theirs, start(), steps=5), rtol=0, atol=1e-6)


class Model(nnx.Module):
    """Stacked layers of a two-matrix network, in the shape of a real model's parameters."""

    def __init__(self):
        keys = jax.random.split(jax.random.key(0), 3)
        self.embed_tokens = nnx.Param(jax.random.normal(keys[0], (16, 64)))
        self.layers = nnx.Dict(
            up=nnx.Param(jax.random.normal(keys[1], (2, 64, 128)) / 8),
            down=nnx.Param(jax.random.normal(keys[2], (2, 128, 64)) / 16),
            norm=nnx.Param(jnp.ones((2, 64))),
        )

    def __call__(self, tokens):
        x = self.embed_tokens[...][tokens]
        for layer in range(2):
            hidden = x * self.layers.norm[layer][None, :]
            x = x + jax.nn.relu(hidden @ self.layers.up[layer]) @ self.layers.down[layer]
        return x @ self.embed_tokens[...].T


@pytest.mark.parametrize(
    ("optim", "rate"),
    [("adamw", 1e-2), ("adamw_8bit", 1e-2), ("lion", 1e-3), ("sgd", 0.1), ("muon", 1e-2), ("adafactor", 1e-2)],
)
def test_trains_an_nnx_model_in_a_jitted_donated_scan(optim, rate):
    definition, params = nnx.split(Model(), nnx.Param)
    optimizer = make_optimizer(optim, rate, weight_decay=0.01)
    tokens = jnp.arange(16)

    def loss(params):
        logits = nnx.merge(definition, params)(tokens)
        return optax.softmax_cross_entropy_with_integer_labels(logits, (tokens * 7 + 3) % 16).mean()

    def body(carry, _):
        params, state = carry
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), value

    run = jax.jit(lambda carry: jax.lax.scan(body, carry, length=40), donate_argnums=0)
    state = optimizer.init(params)
    structure = jax.tree.structure((params, state))
    carry, losses = run((params, state))
    assert jax.tree.structure(carry) == structure
    assert losses[-1] < 0.2 * losses[0], losses


def test_decay_spares_what_trainer_spares():
    config = transformers.LlamaConfig(
        vocab_size=8,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        attention_bias=True,
    )
    model = transformers.LlamaForCausalLM(config)
    expected = set(transformers.Trainer.get_decay_parameter_names(None, model))
    everything = [name for name, _ in model.named_parameters()]
    ours = {
        name
        for name in everything
        if is_decayed(tuple(map(jax.tree_util.DictKey, name.removeprefix("model.").split("."))), jnp.zeros(()))
    }
    assert ours == expected
    assert 0 < len(expected) < len(everything)


def test_what_a_path_tells():
    _, params = nnx.split(Model(), nnx.Param)
    facts = {
        ".".join(names(path)): (is_stacked(path, leaf), is_hidden_matrix(path, leaf))
        for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]
    }
    assert facts == {
        "embed_tokens": (False, False),
        "layers.up": (True, True),
        "layers.down": (True, True),
        "layers.norm": (True, False),
    }
    unrolled = {"layers": [{"w": jnp.zeros((4, 4)), "norm": jnp.zeros(4)}], "lm_head.weight": jnp.zeros((8, 4))}
    facts = {
        ".".join(names(path)): (is_stacked(path, leaf), is_hidden_matrix(path, leaf))
        for path, leaf in jax.tree_util.tree_flatten_with_path(unrolled)[0]
    }
    assert facts == {"layers.0.w": (False, True), "layers.0.norm": (False, False), "lm_head.weight": (False, False)}


@pytest.mark.parametrize("alias", sorted(ALIASES))
def test_aliases_are_names_of_hugging_face(alias):
    assert alias in [optimizer.value for optimizer in transformers.training_args.OptimizerNames]
    assert resolve_name(alias) in DIRECTIONS
    make_optimizer(alias)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"optim": "adamw8bit"}, "optim='adamw8bit' is unknown; did you mean 'adamw_8bit'.*sgd.*adamw_torch"),
        ({"optim": "xyz"}, "optim='xyz' is unknown. Valid: adamw, adamw_8bit, lion, sgd, muon, adafactor; also"),
        ({"adam_beta2": 1.0}, "adam_beta2=1.0 must be at least 0 and below 1"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1 must not be negative"),
        ({"max_grad_norm": -1}, "max_grad_norm=-1 must not be negative"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_optimizer(**arguments)
