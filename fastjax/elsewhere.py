"""What scripts written for Unsloth, TRL, PEFT and transformers say that has another name here, or none.

Each table is for one function, class or section of a config file: a name it does not know -> what to say here instead. A
value that asks for what happens here anyway is taken and left out, as is a name with None, on which nothing turns here.
Everything else raises: what would change a result is never passed over.
"""

import functools
import inspect
import reprlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from fastjax.errors import UserError, check_keys


class Instead(NamedTuple):
    """What does here what was asked for, or why nothing does; and the values that ask for nothing else than happens."""

    words: str
    same: tuple = ()

    def takes(self, value: Any) -> bool:
        return any(type(value) is type(each) and value == each for each in self.same)  # True is not 1


type Table = Mapping[str, Instead | None]


def understood(given: Mapping[str, Any], known: Iterable[str], table: Table, where: str) -> dict[str, Any]:
    """What of `given` is meant for `where` (such as "section 'train'"), which knows the names `known`."""
    check_keys([name for name in given if name not in table], known, where)
    for name in [name for name in given if name in table]:
        value, instead = given[name], table[name]
        if instead is not None and not instead.takes(value):
            said = f"{name}={reprlib.repr(value)}" if instead.same else name
            raise UserError(f"{where} takes no {said}: {instead.words}.")
    return {name: value for name, value in given.items() if name not in table}


def answering[F: Callable](table: Table, where: str) -> Callable[[F], F]:
    """A function, or a class when it is made, that answers keyword arguments it does not have as the table says."""

    def decorate(target: Any) -> Any:
        if isinstance(target, type):
            target.__init__ = decorate(target.__init__)
            return target
        known = list(inspect.signature(target).parameters)

        @functools.wraps(target)
        def answer(*args: Any, **options: Any) -> Any:
            return target(*args, **understood(options, known, table, where))

        return answer

    return decorate


def attributes(table: Table, where: str) -> Callable[[Any, str], Any]:
    """A `__getattr__` that answers as the table says."""

    def __getattr__(self: Any, name: str) -> Any:
        instead = table.get(name)
        raise AttributeError(f"{where} has no {name}{f': {instead.words}' if instead else ''}.")

    return __getattr__


def called(**names: str) -> dict[str, Instead]:
    """Names from elsewhere, and what they are called here."""
    return {other: Instead(f"it is called {own} here") for other, own in names.items()}


ON_THE_MODEL = Instead("what is computed in is the model's, from_pretrained(dtype='bfloat16')", (False, None))
MESH = "mesh=fastjax.make_mesh(...) divides a model over devices, and CUDA_VISIBLE_DEVICES says which there are"
UPLOAD = "write with save_pretrained or save_pretrained_merged, and upload with huggingface_hub.upload_folder"
NO_GGUF = "GGUF is not written: convert what save_pretrained_merged writes with llama.cpp's convert_hf_to_gguf.py"
NO_SWITCH = Instead("nothing needs switching: leave it out")

FROM_PRETRAINED: Table = {
    **called(
        pretrained_model_name_or_path="model_name",
        name="model_name",
        path="model_name",
        torch_dtype="dtype",
        max_length="max_seq_length",
    ),
    "load_in_8bit": Instead("weights are kept in 4 bits, load_in_4bit=True, or in 16, False", (False,)),
    "load_in_16bit": Instead("load_in_4bit=False keeps weights in 16 bits", (False,)),
    "load_in_fp8": Instead("weights are kept in 4 bits, load_in_4bit=True, or in 16, False", (False,)),
    "quantization_config": Instead("load_in_4bit=True packs weights to NF4 with double quantisation", (None,)),
    "token": Instead("log in with `hf auth login`, or set HF_TOKEN", (None,)),
    "device_map": Instead(MESH, (None, "auto", "sequential")),
    "use_gradient_checkpointing": Instead(
        "get_peft_model takes it, and SFTConfig as gradient_checkpointing", ("unsloth",)
    ),
    "trust_remote_code": Instead("no code of a checkpoint is run", (False,)),
    "attn_implementation": Instead("attention picks its kernels by itself", (None,)),
    "rope_scaling": Instead("the checkpoint's config.json says it", (None,)),
    "revision": Instead(
        "download it with huggingface_hub.snapshot_download(..., revision=...) and give its path", (None,)
    ),
    "fast_inference": Instead("generate needs no other engine", (False,)),
    "max_lora_rank": None,
    "gpu_memory_utilization": Instead("XLA_PYTHON_CLIENT_MEM_FRACTION in the environment says it"),
    "fix_tokenizer": Instead("the tokenizer is used as it is saved", (False,)),
    "use_cache": Instead("keys and values are always kept", (True,)),
    "low_cpu_mem_usage": None,
}
GET_PEFT_MODEL: Table = {
    **called(rank="r", alpha="lora_alpha", dropout="lora_dropout", lora_r="r", lora_target_modules="target_modules"),
    "loftq_config": Instead("LoRA starts as PEFT starts it, B at zero", (None, {})),
    "init_lora_weights": Instead("LoRA starts as PEFT starts it, B at zero", (True,)),
    "use_dora": Instead("LoRA is plain or rank-stabilised (use_rslora)", (False,)),
    "rank_pattern": Instead("all modules have the same rank r", (None, {})),
    "alpha_pattern": Instead("all modules have the same lora_alpha", (None, {})),
    "exclude_modules": Instead("target_modules says which there are, and may be a regular expression", (None,)),
    "layers_pattern": Instead("layers_to_transform takes the layers' numbers", (None,)),
    "max_seq_length": Instead("from_pretrained takes it"),
    "task_type": Instead("every model is a causal language model", ("CAUSAL_LM",)),
    "finetune_vision_layers": Instead("models have no vision layers", (False,)),
    "finetune_language_layers": Instead("target_modules says what is trained", (True,)),
    "finetune_attention_modules": Instead("target_modules says what is trained", (True,)),
    "finetune_mlp_modules": Instead("target_modules says what is trained", (True,)),
    "qat_scheme": Instead("training sees the weights as they are packed", (None,)),
}
SFT_CONFIG: Table = {
    **called(
        lr="learning_rate",
        batch_size="per_device_train_batch_size",
        micro_batch_size="per_device_train_batch_size",
        eval_batch_size="per_device_eval_batch_size",
        epochs="num_train_epochs",
        num_epochs="num_train_epochs",
        steps="max_steps",
        scheduler="lr_scheduler_type",
        lr_scheduler="lr_scheduler_type",
        optimizer="optim",
        warmup="warmup_steps",
        clip_grad_norm="max_grad_norm",
        sequence_len="max_length",
        sample_packing="packing",
        evaluation_strategy="eval_strategy",
    ),
    "lr_scheduler_kwargs": Instead("schedules have no further settings", (None, {})),
    "optim_args": Instead(
        "adam_beta1, adam_beta2, adam_epsilon and weight_decay are all the settings there are", (None,)
    ),
    "optim_target_modules": Instead("what LoRA is on is trained, target_modules of get_peft_model", (None,)),
    "label_smoothing_factor": Instead("give SFTTrainer a loss_fn of your own", (0, 0.0)),
    "loss_type": Instead("the loss is the negative log-likelihood; SFTTrainer takes a loss_fn of your own", ("nll",)),
    "bf16_full_eval": ON_THE_MODEL,
    "fp16_full_eval": ON_THE_MODEL,
    "tf32": Instead("JAX_DEFAULT_MATMUL_PRECISION in the environment says it", (None,)),
    "gradient_checkpointing_kwargs": None,
    "activation_offloading": Instead(
        "gradient_checkpointing='offload' keeps activations in the host's memory", (False,)
    ),
    "torch_compile": Instead("a step is compiled as a whole, always", (True, False)),
    "use_liger_kernel": Instead("the fused loss and kernels are always used", (True, False)),
    "group_by_length": Instead("packing=True leaves no padding", (False,)),
    "train_sampling_strategy": Instead("rows are shuffled; packing=True leaves no padding", ("random",)),
    "shuffle_dataset": None,
    "packing_strategy": Instead("examples are packed best fit first", ("bfd",)),
    "padding_free": Instead("packing=True leaves no padding", (False,)),
    "eval_packing": Instead("packing is for both data sets", (None,)),
    "pad_to_multiple_of": None,
    "dataset_num_proc": None,
    "dataset_batch_size": None,
    "dataset_kwargs": Instead("the settings of SFTConfig say how records are read", (None, {})),
    "remove_unused_columns": None,
    "dataloader_num_workers": None,
    "dataloader_pin_memory": None,
    "dataloader_drop_last": Instead("the last step of an epoch has what rows are left, none is dropped", (False,)),
    "data_seed": Instead("seed orders the data too", (None,)),
    "average_tokens_across_devices": Instead("losses are means over all tokens of all devices", (True,)),
    "auto_find_batch_size": Instead("`fastjax plan` says which batch fits", (False,)),
    "logging_strategy": Instead("logging_steps says how often", ("steps",)),
    "logging_first_step": Instead("logging_steps=1 logs every step", (False,)),
    "logging_dir": Instead("reports lie in output_dir", (None,)),
    "skip_memory_metrics": None,
    "eval_on_start": Instead("call trainer.evaluate() before trainer.train()", (False,)),
    "eval_delay": Instead("evaluation begins with the first eval_steps", (None, 0)),
    "eval_accumulation_steps": None,
    "do_train": None,
    "do_eval": None,
    "metric_for_best_model": Instead("the best model is that of the lowest eval_loss", (None, "eval_loss", "loss")),
    "greater_is_better": Instead("the best model is that of the lowest eval_loss", (None, False)),
    "save_only_model": Instead("checkpoints hold all that resuming takes; output_dir has the adapter alone", (False,)),
    "save_safetensors": Instead("everything is written as safetensors", (True,)),
    "overwrite_output_dir": Instead(
        "resume_from_checkpoint goes on with what output_dir holds; to start anew choose another", (False,)
    ),
    "push_to_hub": Instead(UPLOAD, (False,)),
    "hub_model_id": Instead(UPLOAD, (None,)),
    "hub_token": Instead(UPLOAD, (None,)),
    "eos_token": Instead("set tokenizer.eos_token", (None,)),
    "pad_token": Instead("padding is masked, no token stands for it", (None,)),
    "chat_template_path": Instead("set tokenizer.chat_template", (None,)),
    "model_init_kwargs": Instead("FastLanguageModel.from_pretrained takes them", (None, {})),
    "embedding_learning_rate": Instead("all that is trained has the same learning_rate", (None,)),
    "use_cpu": Instead("JAX_PLATFORMS=cpu in the environment says it", (False,)),
    "deepspeed": Instead(MESH, (None,)),
    "fsdp": Instead(MESH, (None, "", [])),
    "local_rank": None,
    "ddp_find_unused_parameters": None,
}
CONFIG_DATA: Table = called(file="path", dataset="path", train_path="path", text_field="dataset_text_field")
SFT_TRAINER: Table = {
    **called(processing_class="tokenizer"),
    "peft_config": Instead("attach LoRA first, model = FastLanguageModel.get_peft_model(model, r=16)", (None,)),
    "formatting_func": Instead("give the data set a column `text`, or `messages`, by dataset.map(...)", (None,)),
    "data_collator": Instead("SFTConfig says what is learnt: completion_only_loss, response_part, packing", (None,)),
    "compute_metrics": Instead("evaluation gives eval_loss and eval_perplexity; callbacks may add their own", (None,)),
    "preprocess_logits_for_metrics": Instead("evaluation gives eval_loss and eval_perplexity", (None,)),
    "compute_loss_func": Instead("loss_fn(module, batch) replaces the loss", (None,)),
    "optimizers": Instead(
        "SFTConfig(optim=..., lr_scheduler_type=...) names them; make_train_step takes any of Optax",
        (None, (None, None)),
    ),
    "model_init": Instead("give the model itself", (None,)),
}
SAVE: Table = {
    **called(save_directory="directory"),
    "safe_serialization": Instead("everything is written as safetensors", (True, None)),
    "push_to_hub": Instead(UPLOAD, (False,)),
    "token": Instead(UPLOAD, (None,)),
    "private": Instead(UPLOAD, (None,)),
    "max_shard_size": None,
    "maximum_memory_usage": None,
}
GENERATE: Table = {
    "max_length": Instead("max_new_tokens counts what is added to the prompt"),
    "min_new_tokens": Instead("eos_token_id=[] lets a text go on to max_new_tokens", (None, 0)),
    "use_cache": Instead("keys and values are always kept", (True,)),
    "num_beams": Instead("texts are drawn or greedy; num_return_sequences gives several", (1,)),
    "generation_config": Instead("give its settings by name", (None,)),
    "stopping_criteria": Instead("stop_strings and eos_token_id end a text", (None,)),
    "pad_token_id": None,
    "token_type_ids": None,
    "cache_implementation": Instead("kv_cache_dtype says how keys and values are kept", (None,)),
    "return_dict_in_generate": Instead("fastjax.generate.complete gives log-probabilities and reasons", (False,)),
    "output_scores": Instead("fastjax.generate.complete gives log-probabilities", (False,)),
}
MODEL: Table = {
    **dict.fromkeys(("push_to_hub", "push_to_hub_merged"), Instead(UPLOAD)),
    **dict.fromkeys(("save_pretrained_gguf", "push_to_hub_gguf"), Instead(NO_GGUF)),
    **dict.fromkeys(("eval", "train", "to", "cuda", "half", "compile"), NO_SWITCH),
    **dict.fromkeys(("gradient_checkpointing_enable", "enable_input_require_grads"), NO_SWITCH),
    "merge_and_unload": Instead("save_pretrained_merged writes the merged checkpoint"),
    "parameters": Instead("flax.nnx.state(model.module) has them"),
    "load_adapter": Instead("from_pretrained reads an adapter with its base, generate(adapters=[...]) several"),
    "device": Instead("JAX places arrays: leave it out"),
}
TRAINER: Table = {
    "save_model": Instead("write model.save_pretrained(directory)"),
    "push_to_hub": Instead(UPLOAD),
    "add_callback": Instead("give callbacks=[...] to SFTTrainer"),
    "state": Instead("trainer.log_history has the records, and trainer.train() returns what the run came to"),
    "processing_class": Instead("it is called tokenizer here"),
    "predict": Instead("trainer.evaluate() gives the loss, model.generate texts"),
}
TOP_LEVEL: Table = {
    **dict.fromkeys(("FastModel", "FastLlamaModel"), Instead("it is called FastLanguageModel here")),
    **dict.fromkeys(("TrainingArguments", "UnslothTrainingArguments"), Instead("it is called SFTConfig here")),
    **dict.fromkeys(("Trainer", "UnslothTrainer"), Instead("it is called SFTTrainer here")),
    **dict.fromkeys(
        ("is_bfloat16_supported", "is_bf16_supported"),
        Instead("models compute in bfloat16 unless from_pretrained(dtype=...) says otherwise"),
    ),
    "LoraConfig": Instead("FastLanguageModel.get_peft_model takes its options"),
    "get_chat_template": Instead("tokenizer.chat_template is used as the checkpoint has it, or as you set it"),
    **dict.fromkeys(
        ("standardize_sharegpt", "standardize_data_formats", "to_sharegpt"),
        Instead("columns `messages` and `conversations` are read as they are"),
    ),
    "FastVisionModel": Instead("models are of text alone"),
    **dict.fromkeys(
        ("DPOTrainer", "GRPOTrainer", "ORPOTrainer", "PatchDPOTrainer"), Instead("only SFTTrainer is there")
    ),
}
