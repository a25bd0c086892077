"""The fields that every spec has, with their defaults, and access to fields by dotted path.

A spec starts from `base_config()`, which is locked: a misspelt field is an error where it is written.
A section's fields are what its module's builder takes.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

# What other libraries and papers call a field.
_SYNONYMS = {
    "optim.lr": "learning_rate max_lr peak_lr lr_rate step_size",
    "optim.schedule": "lr_scheduler_type lr_schedule scheduler",
    "optim.warmup_steps": "warmup lr_warmup_steps num_warmup_steps warmup_ratio",
    "optim.clip": "max_grad_norm grad_clip gradient_clip clip_grad clip_norm gradient_clipping",
    "optim.weight_decay": "wd decay",
    "optim.offload": "cpu_offload optimizer_offload offload_optimizer host_offload",
    "optim.rounding": "stochastic_rounding bf16_params pure_bf16 master_weights",
    "steps": "max_steps num_steps total_steps train_steps num_train_steps epochs num_train_epochs iterations",
    "seed": "random_seed rng_seed",
    "batch.prompts": "batch_size train_batch_size global_batch_size prompts_per_step per_device_train_batch_size",
    "batch.group_size": "num_generations generations group n_samples samples_per_prompt num_samples rollout_n"
    " num_return_sequences response_candidates_count",
    "batch.pack_tokens": "max_tokens_per_batch micro_batch_tokens packing",
    "batch.pack_rows": "micro_batch_size gradient_accumulation_steps",
    "sampler.max_new_tokens": "max_tokens max_completion_length max_output_tokens max_response_length response_length",
    "sampler.temperature": "temp",
    "sampler.slots": "max_num_seqs concurrency max_concurrency",
    "sampler.stop": "stop_tokens stop_strings stop_token_ids stop_sequences eos",
    "rollout.max_length": "max_seq_length max_model_len max_seq_len context_length max_context_length seq_len",
    "rollout.max_turns": "turns num_turns max_episode_steps",
    "scoring.timeout_s": "timeout evaluator_timeout reward_timeout",
    "grpo.preset": "algorithm loss_type loss_method rl_loss_method",
    "grpo.kl_weight": "beta kl_beta kl_coef kl_loss_coef kl_coeff",
    "grpo.clip_low": "epsilon epsilon_low clip_eps clip_ratio cliprange",
    "grpo.clip_high": "epsilon_high clip_ratio_high",
    "grpo.entropy_weight": "entropy_coef entropy_coeff ent_coef",
    "grpo.updates_per_batch": "ppo_epochs num_iterations mu",
    "grpo.minibatches": "num_minibatches num_mini_batches",
    "grpo.scale": "scale_rewards norm_adv normalize_advantages",
    "lora.rank": "r lora_rank lora_r",
    "lora.alpha": "lora_alpha",
    "lora.targets": "target_modules lora_target_modules",
    "model.path": "model_name_or_path model_name base_model pretrained model_id checkpoint_path",
    "model.remat": "gradient_checkpointing activation_checkpointing",
    "model.dtype": "bf16 fp16 precision torch_dtype mixed_precision",
    "model.attention": "attn_implementation flash_attention attn",
    "tasks.train": "dataset train_dataset dataset_name data train_file train_files train_data",
    "tasks.heldout": "eval_dataset validation test_dataset val_files evaluation_dataset",
    "evaluator": "reward reward_fn reward_function reward_funcs scorer grader",
    "environment": "env tools",
    "eval.every": "eval_steps eval_interval test_freq eval_every",
    "eval.samples": "eval_samples k num_eval_samples",
    "checkpoint.every": "save_steps save_freq save_interval save_every",
    "checkpoint.keep": "save_total_limit max_to_keep keep_checkpoints",
    "logging.every": "logging_steps log_interval log_every",
    "mesh.tensor": "tensor_parallel_size tp tensor_parallel",
    "mesh.context": "context_parallel_size cp context_parallel sequence_parallel",
    "mesh.fsdp": "fsdp_size zero_stage",
    "mesh.data": "data_parallel_size dp data_parallel",
}


def cache_folder() -> str:
    """Returns $RFTJAX_CACHE, else rftjax under $XDG_CACHE_HOME or ~/.cache."""
    cache = os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    named = os.environ.get("RFTJAX_CACHE") or os.path.join(cache, "rftjax")
    return os.path.abspath(os.path.expanduser(named))


def embedded_model() -> str:
    """Returns where `fetch_model` puts the quickstart's GGUF file."""
    return os.path.join(cache_folder(), "SmolLM2-135M-Instruct.Q4_1.gguf")


def base_config() -> ConfigDict:
    """Returns every field with its default; empty ones that must be set are `check`'s to name.

    A spec adds fields of its own under `with config.unlocked():`.
    """
    config = ConfigDict(
        {
            "seed": 0,
            "steps": 100,
            "evaluator": "",  # "module:name" or "file.py:name"; required
            "environment": "",  # the same; "": the model answers once
            "agent": "",  # in its place: the same of a function that calls the model itself, or a server's URL
            "hooks": "",  # "file.py:name" of a function that sees every step; "": none
            "export": True,  # write a Hugging Face directory at the end
            "export_step": "best",  # of checkpoint.best_metric, where there is one; or "last"
            "model": {
                "path": "",  # directory, .gguf file or hub name; required
                "dtype": "float32",  # of the computation; trained weights are float32, see optim.rounding
                "init": "pretrained",  # or "random", from a config.json alone
                "attention": "blocked",  # or "tiled", "plain"; "cudnn", "triton" on NVIDIA GPUs, "splash" on TPUs
                "remat": "",  # computed again for the backward pass: "products" what lies between, "layer" all; "" none
            },
            "tasks": {
                "train": "",  # file, dataset or "module:name" of rows; required
                "heldout": "",
                "heldout_count": 0,  # this many are taken out of `train` where `heldout` is ""
                "map": "",  # "module:name" of a function from a row to a row
                "split": "train",
                "heldout_split": "",  # "": the same as `split`
                "limit": 0,  # rows read; 0: all
                "weight": "",  # field of a row that scales its part of the loss; "": all count alike
                "temperature": "",  # field of a row with its own sampling temperature
                "sampling": "",  # "file.py:name" of a curriculum or of weights; "": each task once an epoch
                "allow_overlap": False,
                "max_prompt_tokens": 0,  # rows with longer prompts are left out; 0: none
            },
            "batch": {
                "prompts": 8,
                "group_size": 8,  # samples a prompt
                "pack_tokens": 0,  # tokens of a packed row, or of the longest sequence; 0: by the job's lengths
                "pack_rows": 1,  # packed rows of a micro-batch, a device
                "memory": 0.0,  # GB a device for activations where pack_tokens is 0; 0.0: a quarter of it
            },
            "sampler": {
                "max_new_tokens": 256,  # of one turn
                "temperature": 1.0,
                "top_p": 1.0,
                "top_k": 0,  # 0: off
                "slots": 64,  # rows that decode at once
                "stop": (),  # what ends a turn beside the model's own stop tokens: texts or ids
                "dispatch_steps": 16,  # decode steps between two looks of the host
                "bridge_steps": -1,  # of a short dispatch while slots are refilled; 0: none; -1: by the device
                "prefill_rows": 8,
                "prefill_chunk": 64,  # tokens
                "pool": 0,  # rows of the KV cache; 0: chosen from `slots`
            },
            "chat": {
                "thinking": "template",  # its own default; "on", "off", or an effort: "low", "medium", "high"
                # What a template rewrites begins a new sequence ("template"), or stays as it was sampled ("kept").
                "history": "template",
            },
            "rollout": {
                "max_turns": 1,
                "max_length": 1024,  # tokens of a whole conversation
                # What becomes of a turn that a token limit cut: the environment answers it ("environment"), the
                # episode ends ("end"), or ends and is not trained on ("mask").
                "truncated_turns": "environment",
                "partial": 0,  # prompts under way beside a step's, whose unfinished answers the next step goes on with
            },
            "overlap": {"max_staleness": 0},  # 1: the next batch is sampled while this one trains
            "scoring": {
                "workers": 2,
                "timeout_s": 10.0,
                "max_error_share": 0.25,
                "env": (),  # names of environment variables that evaluators get, an API key for example
                "sandbox": False,  # True: the evaluator runs code; nothing starts without a sandbox
            },
            "environments": {
                "workers": 2,
                "timeout_s": 60.0,
                "env": (),
                "tool_timeout_s": 0.0,  # of one call of a tool; what is late is told to the model
                "max_calls": 0,  # of tools in one turn
                "max_message_tokens": 0,  # longer messages of environments and tools are cut
            },
            "agents": {
                "workers": 2,
                "timeout_s": 1800.0,  # of a whole rollout, the model's time included
                "env": (),
                "address": "127.0.0.1:0",  # where the model listens for them; port 0: any free one
            },
            "serving": {  # of --mode=serve
                "host": "127.0.0.1",
                "port": 8000,  # 0: any free one
                "max_request_bytes": 4 * 2**20,
                "max_waiting": 1024,  # turns that wait for a slot; more are told to come again
            },
            "grpo": {
                "preset": "grpo",
                # Fields of the preset: the value of the preset where they are not given.
                "baseline": placeholder(str),
                "scale": placeholder(str),
                "eps": placeholder(float),
                "objective": placeholder(str),
                "ratio": placeholder(str),
                "clip_low": placeholder(float),
                "clip_high": placeholder(float),
                "dual_clip": placeholder(float),
                "sapo_tau_pos": placeholder(float),
                "sapo_tau_neg": placeholder(float),
                "aggregate": placeholder(str),
                "max_tokens": placeholder(int),
                "kl_weight": placeholder(float),
                "kl": placeholder(str),
                "kl_times_ratio": placeholder(bool),
                "entropy_weight": placeholder(float),
                "tis_cap": placeholder(float),
                # Fields beside the preset.
                "credit": "trajectory",  # "turn": a turn's tokens get the return from that turn on
                "loss": "",  # "module:name" or "file.py:name" of a term that is added to the loss
                "updates_per_batch": 1,  # passes over a step's minibatches
                "minibatches": 1,  # updates of one pass
                "minibatch_groups": True,  # False: a group may lie in several minibatches
                "kl_in_reward": False,  # the KL is taken off the reward, not added to the loss
                "kl_refresh_steps": 0,  # steps after which the reference becomes the policy; 0: never
                "mask_truncated": False,
                "drop_zero_variance": False,  # groups of equal rewards are not trained on
                "dynamic_prompts": 0,  # further prompts a step in place of groups of equal rewards
                "overlong_buffer": 0,  # last tokens before the limit that cost reward; 0: off
                "overlong_penalty": 1.0,  # what an answer at the limit costs
                "routing_replay": False,  # an update computes each token with the experts that its sampler chose
            },
            "optim": {
                "lr": 1e-5,
                "schedule": "constant",
                "warmup_steps": 0,
                "clip": 1.0,  # of the gradient's global norm; 0.0: off
                "weight_decay": 0.0,
                "beta1": 0.9,  # Adam's mean of gradients
                "beta2": 0.999,  # and of their squares
                "eps": 1e-8,
                "final_lr_share": 0.0,  # of lr, where the linear and the cosine schedule end
                "offload": "",  # to the host's memory: "moments", Adam's; "all", the trained weights too; "": nothing
                "rounding": "",  # "stochastic": trained weights are bfloat16 alone; "": they are float32
                "max_nonfinite": 3,  # steps in a row without a finite gradient after which a run ends; 0: never
            },
            "lora": {
                "rank": 0,  # 0: full fine-tuning
                "alpha": 16.0,
                "targets": "all",  # or of query,key,value,output,gate,up,down
                "path": "",  # adapters to start from: a PEFT directory or a run's workdir
            },
            "mesh": {
                "data": -1,
                "fsdp": 1,
                "expert": 1,
                "context": 1,
                "tensor": 1,
            },  # -1: the devices that the others leave
            "eval": {
                "every": 10,  # steps, and at the start and the end; 0: never
                "sets": (),  # further held-out sets, each "name=source" or "name=source#split"
                "evaluator": "",  # scores held-out answers; "": the run's own evaluator
                "samples": 1,  # a task
                "temperature": 1.0,  # 0.0: greedy
                "top_p": 1.0,
                "top_k": 0,
                "max_tasks": 0,  # of each set; 0: all
                "pass_k": (),  # for these K the chance that one of K samples is right
                "pass_reward": 1.0,  # a sample is right from this reward on
                "patience": 0,  # evaluations without a new best after which a run ends; 0: never
                "dead_steps": 0,  # steps without variance in any group after which it ends; 0: never
            },
            "checkpoint": {
                "every": 10,  # steps; 0: at the end only
                "keep": 2,
                "best_metric": "eval/reward",  # the highest is kept too; see eval.patience
            },
            "alarms": {  # thresholds; 0 switches an alarm off
                "window": 5,  # steps of a mean
                "heldout_fall": 0.05,  # below the best, while the training reward rises
                "length_factor": 2.0,  # of a completion against the first steps
                "duplicate_share": 0.5,
                "part_fall": 0.1,  # of another part, while one is reached
                "logprob_diff": 0.1,  # nats a token between sampler and trainer
                "entropy_share": 0.1,  # of the first steps' entropy, while the reward is not near its best
                "truncated_share": 0.5,  # of answers that stay cut by a token limit
                "truncated_rise": 0.2,  # of that share since the first steps
                "same_answer_share": 0.5,  # of answers to all tasks that are one text, and wrong
            },
            "logging": {
                "every": 1,
                "rollouts": 8,  # in TensorBoard
                "histograms": True,
                "keep_rollouts": -1,  # latest training steps in rollouts/; -1: all; 0: no rollouts at all
                "compress_rollouts": False,  # with gzip; names then end in .jsonl.gz
                "to": (),  # services beside TensorBoard: wandb, mlflow, trackio
                "project": "rftjax",  # of these services
                "name": "",  # of the run there; "": its workdir's
            },
        }
    )
    return config.lock()


def flatten(config: ConfigDict | Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns the values by dotted path, lists as tuples and unset placeholders as None."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, (ConfigDict, Mapping)) and len(value):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = tuple(value) if isinstance(value, list) else value
    return flat


# What errors call the types of fields; all others are tuples.
TYPES = {bool: "True or False", int: "a whole number", float: "a number", str: "a text"}


def field_type(config: ConfigDict, field: str) -> type:
    """Returns the type that the field takes, a placeholder's own; KeyError or AttributeError where there is none."""
    *sections, name = field.split(".")
    found: Any = config
    for section in sections:
        found = found[section]
    return found.get_type(name)


def has_type(value: Any, wanted: type) -> bool:
    """Says whether a field of type `wanted` takes the value: whole numbers are numbers, booleans are not."""
    if wanted is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if wanted is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, wanted)


def suggest(field: str, known: Iterable[str]) -> str:
    """Returns " (did you mean ...?)" with the known fields that the name may stand for, or "".

    Fields of the same last name come first, then what other libraries call so, then near spellings.
    """
    known = list(known)
    name = field.rpartition(".")[2]
    near = [other for other in known if other.rpartition(".")[2] == name]
    near += [other for other in known if name.lower() in _SYNONYMS.get(other, "").split()]
    near += difflib.get_close_matches(field, known, n=3, cutoff=0.7)
    near = list(dict.fromkeys(near))[:3]
    return f" (did you mean {' or '.join(near)}?)" if near else ""


def expand_home(config: ConfigDict) -> ConfigDict:
    """Returns the config with `~` and `~user` at the start of every text replaced by that home directory."""
    expanded = config.copy_and_resolve_references()
    with expanded.unlocked():
        for field, value in flatten(expanded).items():
            if (found := expand_value(field, value)) != value:
                assign(expanded, field, found)
    return expanded


def as_now(field: str, value: Any) -> Any:
    """Returns a field's value as it is written now: `model.remat` was True or False."""
    words = {"true": "layer", "false": ""} if field == "model.remat" else {}
    return words.get(str(value).lower(), value)


def expand_value(field: str, value: Any) -> Any:
    """Returns a field's value `as_now`, `~` expanded, also in "~/file.py:name" and in the sources of `eval.sets`.

    A user that does not exist stays as it is.
    """
    if field == "model.remat":
        return as_now(field, value)
    if field == "eval.sets" and isinstance(value, tuple):
        return tuple(map(_expand_set, value))
    if field in ("evaluator", "eval.evaluator") and isinstance(value, str) and "~" in value:
        return re.sub(r"(?<![^\s,=])~[\w.-]*(?=/)", lambda home: os.path.expanduser(home[0]), value)
    return os.path.expanduser(value) if isinstance(value, str) else value


def _expand_set(text: Any) -> Any:
    name, equals, source = text.partition("=") if isinstance(text, str) else ("", "", "")
    return f"{name}={os.path.expanduser(source)}" if equals else text


def assign(config: ConfigDict, field: str, value: Any) -> None:
    """Sets the field by path, making sections that are missing; the config must be unlocked."""
    *sections, name = field.split(".")
    found: Any = config
    for section in sections:
        if not isinstance(found.get(section), ConfigDict):
            found[section] = ConfigDict()
        found = found[section]
    found[name] = value
