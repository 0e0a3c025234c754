"""The whole path at full size: a HF checkpoint on disk, loaded and packed, trained, exported, loaded by PEFT.

    python -m bench.whole_path --shape llama3.1-8b --checkpoint /tmp/llama --out whole_path.json

Makes the checkpoint if it is not there. Verifies on this device that packing gives the same bits as on the CPU, and
that PEFT on the dequantised weights computes what the trained model does.
"""

import argparse
import json
import math
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.record import write_record
from bench.workloads import SHAPES, standard_library_texts, write_random_checkpoint
from fastjax import FastLanguageModel, SFTConfig, SFTTrainer
from fastjax.models import param_specs
from fastjax.weights.checkpoint import find_tensors
from fastjax.weights.merge import model_weights
from fastjax.weights.safetensors_file import read_rows
from pallas_kernels import NF4Array, dequantize_nf4, quantize_nf4

GIB = 2**30


def main() -> None:
    arguments = parse_arguments()
    results: dict[str, Any] = {"shape": arguments.shape, "batch": arguments.batch, "sequence": arguments.sequence}
    if not arguments.checkpoint.is_dir():
        results["made_checkpoint_s"] = timed(write_random_checkpoint, arguments.checkpoint, SHAPES[arguments.shape])[1]
    files = arguments.checkpoint.glob("*.safetensors")
    results["checkpoint_gb"] = round(sum(file.stat().st_size for file in files) / 1e9, 2)

    host_before = host_peak_gib()
    (model, _), results["load_s"] = timed(FastLanguageModel.from_pretrained, arguments.checkpoint)
    results["load_host_gib_above_baseline"] = round(host_peak_gib() - host_before, 2)
    results["loaded_device_gib"] = device_gib("bytes_in_use")
    results["bits_per_weight"] = bits_per_weight(model)
    results["packing"] = compare_packing(arguments.checkpoint)
    print(json.dumps(results), flush=True)
    FastLanguageModel.get_peft_model(model, r=16, lora_alpha=16)
    with tempfile.TemporaryDirectory() as output:
        results["training"] = train(model, arguments, output)
        print(json.dumps(results), flush=True)
        results["peft"] = compare_peft(model, arguments.checkpoint, output)
    print(json.dumps(results, indent=1), flush=True)
    write_record(arguments.out, results)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama3.1-8b")
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--sequence", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=20)
    return parser.parse_args()


def timed(function: Any, *arguments: Any) -> tuple[Any, float]:
    began = time.perf_counter()
    result = jax.block_until_ready(function(*arguments))
    return result, round(time.perf_counter() - began, 2)


def host_peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


def device_gib(key: str) -> float | None:
    stats = jax.local_devices()[0].memory_stats()
    return round(stats[key] / GIB, 2) if stats else None


def compare_packing(checkpoint: Path) -> dict[str, Any]:
    """How many bytes of the packed form, and of its dequantised values, differ between this device and the CPU."""
    tensors = find_tensors(checkpoint)
    compared = {}
    for name in ("k_proj", "o_proj", "down_proj"):
        key = next(key for key in sorted(tensors) if name in key)
        weight = read_rows(tensors[key])
        packed = []
        for device in (jax.local_devices()[0], jax.local_devices(backend="cpu")[0]):
            with jax.default_device(device):
                q = jax.jit(quantize_nf4)(jnp.asarray(weight))
                packed.append(q)
        on_cpu = jax.device_put(packed[1], jax.local_devices()[0])
        values = [np.asarray(dequantize_nf4(q, jnp.bfloat16)).view(np.uint16) for q in (on_cpu,)]
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            values.append(np.asarray(dequantize_nf4(packed[1], jnp.bfloat16)).view(np.uint16))
        compared[key] = {
            "codes_differing": int((np.asarray(packed[0].codes) != np.asarray(packed[1].codes)).sum()),
            "scales_differing": int((np.asarray(packed[0].scales) != np.asarray(packed[1].scales)).sum()),
            "scales": int(packed[0].scales.size),
            "offset_differs_by": float(abs(np.asarray(packed[0].offset) - np.asarray(packed[1].offset))),
            "dequantised_values_differing": int((values[0] != values[1]).sum()),
        }
    return compared


def bits_per_weight(model: FastLanguageModel) -> float:
    bits = weights = 0.0
    for leaf in jax.tree.leaves(model.module.layers, is_leaf=lambda leaf: isinstance(leaf, NF4Array)):
        if isinstance(leaf, NF4Array):
            bits, weights = bits + 8 * leaf.nbytes, weights + math.prod(leaf.shape)
    return round(bits / weights, 4)


def train(model: FastLanguageModel, arguments: argparse.Namespace, output: str) -> dict[str, Any]:
    """Through SFTTrainer, as a user would; the adapter is left in `output`."""
    texts = standard_library_texts(6 * arguments.steps * arguments.batch * arguments.sequence)
    config = SFTConfig(
        output_dir=output,
        max_steps=arguments.steps,
        per_device_train_batch_size=arguments.batch,
        max_length=arguments.sequence,
        packing=True,
        learning_rate=2e-4,
        optim="adamw_8bit",
        logging_steps=1,
        save_steps=0,
    )
    trainer = SFTTrainer(model=model, train_dataset=[{"text": text} for text in texts], args=config)
    result, seconds = timed(trainer.train)
    records = [record for record in result.log_history if "loss" in record]
    return {
        "seconds": seconds,
        "losses": [round(record["loss"], 4) for record in records],
        "tokens": result.num_tokens,
        "tokens_per_s_logged": [round(record.get("tokens_per_second", 0)) for record in records],
        "peak_device_gib": device_gib("peak_bytes_in_use"),
    }


def compare_peft(model: FastLanguageModel, checkpoint: Path, adapter: str) -> dict[str, Any]:
    """PEFT loads the adapter onto a transformers model holding our dequantised weights; logits of both in float32."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokens = np.random.default_rng(0).integers(3, model.config.vocab_size, (1, 512)).astype(np.int32)
    model.module.dtype = jnp.dtype(
        jnp.float32
    )  # bfloat16's rounding, multiplied up by random layers, would hide mistakes
    ours = np.asarray(model(tokens))
    theirs = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, device_map={"": device}).eval()
    parameters = dict(theirs.named_parameters())
    for name, spec in param_specs(model.config).items():
        if spec.quantize:
            packed = model_weights(model.module)[name]
            for layer, hf_name in enumerate(spec.hf_names()):
                parameters[hf_name].data.copy_(torch.from_numpy(np.array(dequantise_layer(packed, layer))))
    ids = torch.tensor(tokens, dtype=torch.long, device=device)
    with torch.no_grad():
        base = theirs(ids).logits.cpu().numpy()
        logits = peft.PeftModel.from_pretrained(theirs, adapter).eval()(ids).logits.cpu().numpy()
    return {
        "logits_error": norm_ratio(ours - logits, logits),
        "logits_error_max": float(np.abs(ours - logits).max() / np.abs(logits).max()),
        "adapter_effect": norm_ratio(logits - base, logits),
        "same_argmax": float((ours.argmax(-1) == logits.argmax(-1)).mean()),
    }


@jax.jit
def dequantise_layer(stack: NF4Array, layer: jax.Array) -> jax.Array:
    return dequantize_nf4(jax.tree.map(lambda leaf: leaf[layer], stack), jnp.float32)


def norm_ratio(difference: np.ndarray, reference: np.ndarray) -> float:
    return float(np.linalg.norm(difference) / np.linalg.norm(reference))


if __name__ == "__main__":
    main()
