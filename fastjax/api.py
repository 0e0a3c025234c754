"""FastLanguageModel: what a script holds. A thin shell over the nnx model, the weights' files and generation."""

import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from fastjax.compile_cache import enable_compile_cache
from fastjax.distributed.roles import is_writer
from fastjax.elsewhere import FROM_PRETRAINED, GET_PEFT_MODEL, MODEL, SAVE, answering, attributes
from fastjax.errors import UserError, writing
from fastjax.generate import generate, stream
from fastjax.lora import LoraConfig, add_lora, trainable_parameters
from fastjax.models import Llama, LlamaConfig, param_specs
from fastjax.parallel.hosts import onto_mesh, spread
from fastjax.parallel.mesh import axis_size, standard_mesh
from fastjax.train.checkpoints import list_checkpoints
from fastjax.train.mesh_layout import trained_shardings
from fastjax.train.recompute import checked_choice
from fastjax.train.step import TrainState
from fastjax.train.tensor_parallel import check_tensor_size
from fastjax.weights.adapter import is_adapter, load_adapter, read_adapter_config, save_adapter
from fastjax.weights.checkpoint import CONFIG_NAME, read_config, resolve_checkpoint
from fastjax.weights.load import load_weights
from fastjax.weights.merge import save_model

DTYPES = ("bfloat16", "float16", "float32")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")


@partial(jax.jit, static_argnums=0)
def _forward(definition: nnx.GraphDef, parameters: nnx.State, *inputs: jax.Array | None) -> jax.Array:
    return nnx.merge(definition, parameters)(*inputs)


class FastLanguageModel:
    """A causal language model with its tokenizer: call it for logits, train it, save it, generate with it.

    `module` is the flax nnx model, for scripts that want it; `config` its sizes; `lora` the LoRA options once attached.
    """

    def __init__(
        self,
        module: Llama,
        tokenizer: Any = None,
        *,
        name: str = "",
        max_seq_length: int = 2048,
        mesh: Mesh | None = None,
        hf_config: Mapping[str, Any] | None = None,
    ) -> None:
        self.module = module
        self.tokenizer = tokenizer
        self.name = name
        self.max_seq_length = max_seq_length
        self.mesh = None if mesh is None else standard_mesh(mesh)
        self.hf_config = dict(hf_config or {})
        self.lora: LoraConfig | None = None
        self.gradient_checkpointing: str | bool = "auto"

    if not TYPE_CHECKING:
        __getattr__ = attributes(MODEL, "FastLanguageModel")

    @property
    def config(self) -> LlamaConfig:
        return self.module.config

    @classmethod
    @answering(FROM_PRETRAINED, "FastLanguageModel.from_pretrained")
    def from_pretrained(
        cls,
        model_name: str | Path,
        max_seq_length: int = 2048,
        dtype: Any = "bfloat16",
        load_in_4bit: bool = True,
        mesh: Mesh | None = None,
        *,
        full_finetuning: bool = False,
        scan_layers: bool | None = None,
        progress: bool = True,
    ) -> "tuple[FastLanguageModel, Any]":
        """A model and its tokenizer, from a local directory or hub id of a HF checkpoint or of a PEFT adapter.

        `dtype` is what is computed in (bfloat16, which None means too, float16 or float32). `load_in_4bit` packs the
        projections to NF4 with double quantisation. `full_finetuning` keeps every weight in float32, to be trained. An adapter
        brings its base model.
        `scan_layers` compiles one layer and loops over it, which is quick to compile; all layers in line are quicker to run,
        and what a GPU gets unless told otherwise.
        """
        dtype = checked_dtype(dtype, load_in_4bit=load_in_4bit, full_finetuning=full_finetuning)
        directory, base, name = find_model(model_name)
        hf_config = read_config(base)
        config = LlamaConfig.from_hf(hf_config)
        if mesh is not None:
            check_tensor_size(config, axis_size(mesh, "tensor"), packed=load_in_4bit)
        enable_compile_cache()
        # importing transformers takes seconds, and so does packing, which waits for the device
        with ThreadPoolExecutor(1) as pool:
            reading = pool.submit(lambda: load_tokenizer(directory) or load_tokenizer(base))
            weights = load_weights(
                base,
                param_specs(config),
                load_in_4bit=load_in_4bit,
                dtype=jnp.dtype(jnp.float32) if full_finetuning else dtype,
                mesh=mesh,
                progress=progress,
            )
            tokenizer = reading.result()
        loop = jax.default_backend() != "gpu" if scan_layers is None else scan_layers
        module = Llama(config, weights, dtype=dtype, trainable=full_finetuning, scan_layers=loop)
        model = cls(module, tokenizer, name=name, max_seq_length=max_seq_length, mesh=mesh, hf_config=hf_config)
        if is_adapter(directory):
            model.lora = load_adapter(directory, module)
            model._place_trained()
        return model, tokenizer

    @staticmethod
    @answering(GET_PEFT_MODEL, "FastLanguageModel.get_peft_model")
    def get_peft_model(
        model: "FastLanguageModel",
        r: int = 16,
        target_modules: Sequence[str] | str | None = None,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        bias: str = "none",
        use_rslora: bool = False,
        use_gradient_checkpointing: str | bool = "auto",
        random_state: int = 3407,
        *,
        layers_to_transform: Sequence[int] | int | None = None,
        modules_to_save: Sequence[str] | None = None,
    ) -> "FastLanguageModel":
        """The same model, frozen, with LoRA attached. `target_modules` defaults to all seven projections."""
        checked_choice(use_gradient_checkpointing)
        model.lora = LoraConfig.create(
            r=r,
            target_modules=target_modules,
            lora_alpha=lora_alpha,
            lora_dropout=lora_dropout,
            bias=bias,
            use_rslora=use_rslora,
            random_state=random_state,
            layers_to_transform=layers_to_transform,
            modules_to_save=modules_to_save,
        )
        add_lora(model.module, model.lora)
        model.gradient_checkpointing = use_gradient_checkpointing
        model._place_trained()
        return model

    @staticmethod
    def for_inference(model: "FastLanguageModel") -> "FastLanguageModel":
        """The model itself, ready to generate: nothing needs switching. Kept for scripts written for Unsloth."""
        return model

    for_training = for_inference

    def __call__(self, input_ids: Any, positions: Any = None, segment_ids: Any = None) -> jax.Array:
        """Logits float32 [B, S, vocab] of tokens int32 [B, S]."""
        inputs = (
            None if value is None else jnp.asarray(value, jnp.int32) for value in (input_ids, positions, segment_ids)
        )
        return _forward(*nnx.split(self.module), *inputs)

    def generate(
        self, input_ids: Any, max_new_tokens: int = 64, temperature: float | None = None, **options: Any
    ) -> list[list[int]]:
        """Prompts [B, S] (or lists of different lengths) with their continuations.

        `options` are those of fastjax.generate.complete: do_sample, top_k, top_p, min_p, repetition_penalty, seed,
        stop_strings, attention_mask, streamer, num_return_sequences, batch_size, kv_cache_dtype, prompt_lookup_num_tokens,
        adapters (a PEFT directory for each prompt, or None), progress (shown on a terminal), and eos_token_id, which defaults
        to the model's own. A model loaded on a mesh generates there: rows are divided over `data` and `fsdp`, heads with their
        keys and values over `tensor`, and the text is the same.
        """
        settings = {"max_new_tokens": max_new_tokens, "temperature": temperature}
        return generate(self.module, input_ids, **settings, **self._generation_options(options))

    def stream(self, prompt: str | Sequence[int], **options: Any) -> Iterator[str]:
        """The continuation of one prompt, a text or token ids, as text in pieces as they come; options as `generate`."""
        if self.tokenizer is None:
            raise UserError(
                f"{self.name!r} came without a tokenizer, so its tokens cannot be shown as text: use generate."
            )
        ids = self.tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt
        options = self._generation_options(options)
        return stream(self.module, ids, options.pop("tokenizer"), **options)

    def _generation_options(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """`options` with the model's own end-of-sequence tokens and its tokenizer."""
        return {"eos_token_id": self.end_tokens(self.tokenizer), "tokenizer": self.tokenizer} | dict(options)

    def end_tokens(self, tokenizer: Any) -> list[int]:
        """The tokens that end a text: the model's own and the tokenizer's."""
        own = self.hf_config.get("eos_token_id")
        tokens = [*(own if isinstance(own, list | tuple) else [own]), getattr(tokenizer, "eos_token_id", None)]
        return sorted({int(token) for token in tokens if token is not None})

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """How many numbers training changes, and how many there are, as PEFT counts them: what LoRA adds is in both."""
        trained = trainable_parameters(self.module)
        base = sum(math.prod(spec.stacked_shape) for spec in param_specs(self.config).values())
        return trained, base if self.lora is None else base + trained

    def print_trainable_parameters(self) -> None:
        trained, every = self.get_nb_trainable_parameters()
        print(f"trainable params: {trained:,} || all params: {every:,} || trainable%: {100 * trained / every:.4f}")

    def load_train_state(self, state: TrainState) -> None:
        """Put trained parameters back into the module. They are copied: the state may go on to be donated."""
        nnx.update(self.module, jax.tree.map(jnp.copy, state.params))

    @answering(SAVE, "save_pretrained")
    def save_pretrained(self, directory: str | Path) -> None:
        """Write the adapter in PEFT's layout; without LoRA, the whole model as a HF checkpoint. With the tokenizer."""
        directory = Path(directory)
        if self.lora is None:
            save_model(directory, self.module, hf_config=self.hf_config)
        else:
            save_adapter(directory, self.module, self.lora, self.name)
        save_tokenizer(self.tokenizer, directory)

    @answering(SAVE, "save_pretrained_merged")
    def save_pretrained_merged(
        self, directory: str | Path, tokenizer: Any = None, save_method: str = "merged_16bit"
    ) -> None:
        """Write a whole HF checkpoint with LoRA added into the weights, in bfloat16 (float16 for a float16 model).

        With the `tokenizer`, or where none is given the model's own.
        """
        if save_method != "merged_16bit":
            raise UserError(
                f"{save_method=} is not supported; use 'merged_16bit', or save_pretrained for the adapter alone."
            )
        dtype = jnp.float16 if self.module.dtype == jnp.float16 else jnp.bfloat16
        save_model(Path(directory), self.module, hf_config=self.hf_config, dtype=dtype)
        save_tokenizer(self.tokenizer if tokenizer is None else tokenizer, directory)

    def _place_trained(self) -> None:
        """What attaching LoRA made goes to the mesh, where all else is; each device gets what it will train."""
        if self.mesh is None:
            return
        params = nnx.state(self.module, nnx.Param)
        where, _ = trained_shardings(params, (), self.config, self.mesh)
        on_mesh = lambda leaf: getattr(leaf.sharding, "mesh", None) == self.mesh  # noqa: E731
        placed = jax.tree.map(lambda leaf, its: leaf if on_mesh(leaf) else spread(leaf, its), params, where)
        nnx.update(self.module, placed)
        nnx.update(self.module, onto_mesh(nnx.state(self.module), self.mesh))


def checked_dtype(dtype: Any, *, load_in_4bit: bool, full_finetuning: bool) -> jnp.dtype:
    """What a model is to compute in, once it is sure that its options go together."""
    if full_finetuning and load_in_4bit:
        raise UserError(
            "full_finetuning trains the weights themselves, which 4-bit ones cannot be: pass load_in_4bit=False."
        )
    try:
        name = "bfloat16" if dtype is None else jnp.dtype(dtype).name  # numpy takes None for float64
    except TypeError:
        name = str(dtype).removeprefix("torch.")  # scripts written for torch
    if name not in DTYPES:
        raise UserError(f"dtype={dtype!r} is not supported; use one of {', '.join(DTYPES)}.")
    return jnp.dtype(name)


def find_model(model_name: str | Path) -> tuple[Path, Path, str]:
    """Where it is, and where and how called the base is: of an adapter another one."""
    directory = resolve_checkpoint(model_name)
    if not is_adapter(directory):
        of_a_run = list_checkpoints(directory) or directory in list_checkpoints(directory.parent)
        if of_a_run and not (directory / CONFIG_NAME).is_file():
            raise UserError(
                f"{directory} has what a run goes on from, and no adapter: load its output_dir, where the adapter lies once the"
                " run has ended (resume_from_checkpoint=True goes on with it)."
            )
        return directory, directory, str(model_name)
    name = read_adapter_config(directory)[1]
    return directory, resolve_checkpoint(name), name


def save_tokenizer(tokenizer: Any, directory: str | Path) -> None:
    if tokenizer is not None and is_writer():
        with writing(Path(directory)):
            tokenizer.save_pretrained(str(directory))


def load_tokenizer(directory: Path) -> Any:
    """The directory's tokenizer, or None where it holds none."""
    if not any((directory / name).is_file() for name in TOKENIZER_FILES):
        return None
    from transformers import AutoTokenizer  # takes seconds to import; a script that has its own never pays for it

    return AutoTokenizer.from_pretrained(str(directory))
