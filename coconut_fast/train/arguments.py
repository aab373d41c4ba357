"""All settings of a training run in one dataclass; train/recipe.py reads it from YAML and the command line.

Names are those of the official code's args/*.yaml where it has the setting. Each is explained beside it.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from coconut_fast.data.curriculum import METHODS, CurriculumConfig
from coconut_fast.data.graphs import FRONTIERS
from coconut_fast.train.schedule import StageSchedule

if TYPE_CHECKING:
    from transformers import TrainingArguments

PRECISIONS = ("fp32", "bf16", "fp16", "bf16_weights")
DEBUG_PROBLEMS = (5000, 32)  # for training and validation, as in the official code
LR_SCHEDULES = ("constant", "linear", "cosine", "cosine_final")
# TrainingArguments fields allowed in `training_arguments`
PASSED_THROUGH = (
    "activation_checkpointing", "gradient_checkpointing", "adam_epsilon", "tf32", "full_determinism",
    "torch_empty_cache_steps", "logging_first_step", "log_level", "log_level_replica", "log_on_each_node",
    "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id", "ddp_backend", "ddp_timeout",
    "ddp_bucket_cap_mb", "ddp_broadcast_buffers",
)  # fmt: skip
# TrainingArguments field -> our setting for it
RENAMED_FIELDS = {
    "output_dir": "save_path and name",
    "run_name": "name",
    "data_seed": "seed",
    "use_cpu": "device",
    "learning_rate": "lr",
    "lr_scheduler_type": "lr_schedule",
    "warmup_ratio": "warmup_steps",
    "num_train_epochs": "num_epochs",
    "max_steps": "num_epochs and epoch_size",
    "per_device_train_batch_size": "batch_size_training",
    "per_device_eval_batch_size": "eval_batch_size",
    "bf16": "precision",
    "fp16": "precision",
    "eval_strategy": "val_path",
    "save_strategy": "save_steps",
    "save_total_limit": "keep_last",
    "dataloader_num_workers": "num_workers",
    "fsdp_config": "fsdp",
}


@dataclass
class CoconutArguments:
    """Settings of a run; ValueError (naming the setting) where one is invalid."""

    # The run. Everything it writes goes to save_path/name (save_path/name-debug with debug).
    name: str = "coconut"
    project: str = "coconut"  # the tracker's
    save_path: str = "runs"
    seed: int = 0
    debug: bool = False  # 5000 training and 32 validation problems, no checkpoints, no tracker
    only_eval: bool = False  # no training: evaluate load_model_path (or model) on val_path

    # The model: a hub id, a directory, or a mapping {from_config: gpt2, n_layer: 2, ...} for one trained from scratch.
    model: str | dict[str, Any] = "openai-community/gpt2"
    # None: the model's, and its way of writing graphs; "words": word by word, made from train_path; "symbols": graphs,
    # one token per node; else a hub id or a directory. A model that is not from scratch may have none or "symbols".
    tokenizer: str | None = None
    # How a hidden state becomes the next input (model/feedback.py). A model saved with another keeps it at "identity",
    # except for that of pause_as_thought_multipass, where the method is no longer that.
    feedback: str = "identity"
    load_model_path: str | None = None  # weights to start from: a directory, or a torch file (official checkpoints)
    precision: str = "fp32"  # bf16, fp16: compute over fp32 weights; bf16_weights: all bf16, as in the official code
    device: str | None = None  # cpu, cuda; None: a GPU where there is one
    fsdp: bool = False  # shard weights and optimizer over the processes of torchrun (FSDP2); False: DDP

    # The data: JSON or JSON lines of {question, steps, answer}.
    train_path: str | None = None
    val_path: str | None = None

    frontier: str = "shortest_paths"  # symbols: nodes that may be a thought's target (data/graphs.py)
    relabel: bool = False  # symbols: new node numbers in every epoch
    separators: bool = True  # symbols: <eos> and "|" in the question

    # The method and its rows (data/curriculum.py says what each means).
    method: str = "coconut"
    c_thought: int = 1
    max_latent_stage: int = 6
    pad_latent_to_max: bool = True
    uniform_prob: float = 0.0
    replay_prob: float = 0.0
    target: str = "chain"
    markers: bool | None = None
    tokens_per_stage: int = 8
    removal_smoothing: float = float("inf")
    detach_after: int | None = None  # gradients through the last n thoughts only; None: through all
    parallel_rounds: int | None = None  # refine all thoughts in this many parallel rounds; None: one by one

    # The stages (train/schedule.py).
    epochs_per_stage: int = 1
    first_stage_epochs: int | None = None  # of stage 0; None: as the others
    num_epochs: int = 1
    final_epochs: int | None = None  # end after this many epochs in the last stage
    resume: int = 0  # epochs of the plan to skip, for a model trained before (a killed run resumes by itself)
    advance_at: float | list | None = None  # leave a stage once validation accuracy reaches this; list: per stage
    reset_optimizer: str = "stage"  # at stage switches (the paper); "epoch" (official True); "never" (official False)

    # Optimisation: AdamW on all parameters.
    # Effective batch: batch_size_training x gradient_accumulation_steps x processes.
    batch_size_training: int = 32
    gradient_accumulation_steps: int = 1
    epoch_size: int | None = None  # problems per epoch; None: all. The next epoch continues where this one ended
    lr: float = 1e-4
    weight_decay: float = 0.01
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    max_grad_norm: float = 0.0  # 0: no clipping
    warmup_steps: int = 0
    lr_schedule: str = "constant"  # linear, cosine: to 0 over the run; cosine_final: over the last stage's final_epochs
    max_nonfinite: int = 20  # stop after this many steps in a row whose loss or gradient is not finite

    # Evaluation after every epoch, by generation.
    eval_batch_size: int | None = None  # None: chosen by generate()
    eval_examples: int | None = None  # the first n of val_path; None: all
    max_new_tokens: int | None = None  # None: 64 where val_path names gsm, else 128 (official)
    num_thoughts: int | None = None  # only_eval: thoughts per question; None: as the checkpoint says

    # Checkpoints and reports.
    save_only_improve: bool = False  # save after epochs that beat the stage's best accuracy, and at the end
    save_steps: int | None = None  # save every n steps as well
    keep_last: int = 2  # checkpoints kept, besides the best one; 0: all
    logging_steps: int = 10
    report_to: str | list[str] = "none"  # trackers of transformers: wandb, tensorboard, trackio, ...
    num_workers: int = 0  # processes that prepare batches
    training_arguments: dict[str, Any] = field(
        default_factory=dict
    )  # fields of transformers.TrainingArguments: see PASSED_THROUGH

    def __post_init__(self) -> None:
        self._check_values()
        self.curriculum()  # refuses settings that make no sense, as does the schedule
        self.schedule()
        for name, why in self.without_effect().items():
            if (found := getattr(self, name)) != self.__dataclass_fields__[name].default:
                raise ValueError(f"{name}: found {found!r}, which would change nothing: {why}")
        self._check_device()
        self._check_training_arguments()
        self._check_trackers()
        self._check_combinations()

    def without_effect(self) -> dict[str, str]:
        """Settings that change nothing here, with the reason; not the curriculum's shape, of which the official files
        have all keys: a recipe's baselines differ in the method alone."""
        method = METHODS[self.method]
        symbols, thinks = self.tokenizer == "symbols", method.slot == "thought"
        feeds_back = thinks and self.method != "pause_as_thought_multipass"
        rules = (
            (("uniform_prob", "replay_prob", "advance_at"), method.stages == "all", f"{self.method} has one stage"),
            (("tokens_per_stage", "removal_smoothing"), self.method == "icot", "only icot removes single tokens"),
            (("detach_after", "parallel_rounds"), thinks, f"{self.method} has no thoughts"),
            (("feedback",), feeds_back, f"{self.method} feeds back no hidden states"),
            (("relabel", "separators"), symbols, "graphs are written as the recipe says with tokenizer: symbols alone"),
            (("frontier",), symbols and self.target == "random_frontier", "only target: random_frontier asks for one"),
            (("num_thoughts",), self.only_eval, "it is for only_eval; in training the stage says how many"),
        )
        return {name: why for names, followed, why in rules if not followed for name in names}

    def _check_values(self) -> None:
        """ValueError for a setting that makes no sense whatever the others are."""
        for name, allowed in (
            ("precision", PRECISIONS),
            ("lr_schedule", LR_SCHEDULES),
            ("frontier", FRONTIERS),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: found {getattr(self, name)!r}, expected one of {', '.join(allowed)}")
        for name, low in (
            ("batch_size_training", 1),
            ("gradient_accumulation_steps", 1),
            ("max_nonfinite", 1),
            ("logging_steps", 1),
            ("warmup_steps", 0),
            ("keep_last", 0),
            ("epoch_size", 1),
            ("eval_examples", 1),
            ("eval_batch_size", 1),
            ("save_steps", 1),
            ("max_new_tokens", 1),
            ("num_thoughts", 0),
            ("detach_after", 0),
            ("parallel_rounds", 1),
            ("num_workers", 0),
            ("seed", 0),
        ):
            value = getattr(self, name)
            if value is not None and value < low:
                raise ValueError(f"{name}: found {value}, expected {low} or more")
        if self.seed >= 2**32:
            raise ValueError(f"seed: found {self.seed}, expected less than 2**32, NumPy's limit")
        for name in ("lr", "weight_decay", "max_grad_norm"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name}: found {getattr(self, name)}, expected a finite number of at least 0")
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: found {getattr(self, name)}, expected at least 0 and less than 1")
        if isinstance(self.model, dict) and "from_config" not in self.model:
            raise ValueError(
                f"model: found a mapping with {', '.join(self.model)}, expected from_config among its keys"
            )

    def _check_combinations(self) -> None:
        """ValueError for settings that make no sense together."""
        slot = METHODS[self.method].slot
        if slot and not self.c_thought and self.num_thoughts is None:
            raise ValueError(f"c_thought: found 0, expected 1 or more {slot}s per step for method {self.method!r}")
        if self.detach_after is not None and self.parallel_rounds is not None:
            raise ValueError(
                f"detach_after: found {self.detach_after} with parallel_rounds, whose gradients reach all thoughts"
            )
        if self.lr_schedule == "cosine_final" and self.final_epochs is None:
            raise ValueError(
                "final_epochs: found none, expected how many epochs lr_schedule 'cosine_final' decays over"
            )
        ends_early = self.advance_at is not None and self.final_epochs is not None
        if self.lr_schedule in ("linear", "cosine") and ends_early:
            raise ValueError(
                f"lr_schedule: found {self.lr_schedule!r}, expected 'constant' or 'cosine_final', because nobody knows "
                "where a run with advance_at and final_epochs ends"
            )
        for name, used in (("advance_at", self.advance_at is not None), ("save_only_improve", self.save_only_improve)):
            if used and self.val_path is None:
                raise ValueError(f"val_path: found none, expected a file, because {name} looks at validation accuracy")

    def _check_device(self) -> None:
        if self.device not in (None, "cpu", "cuda"):
            raise ValueError(f"device: found {self.device!r}, expected cpu or cuda")
        if self.device == "cuda":
            import torch

            if not torch.cuda.is_available():
                raise ValueError("device: found 'cuda', but torch sees no GPU here")

    def _check_training_arguments(self) -> None:
        for name in self.training_arguments:
            if name.startswith("torch_compile"):
                raise ValueError(
                    f"training_arguments: found {name}, but passes differ in shape from batch to batch and run "
                    "kernels that are compiled already; leave it out"
                )
            ours = name if name in self.__dataclass_fields__ else RENAMED_FIELDS.get(name)
            if ours is not None:
                raise ValueError(f"training_arguments: found {name!r}, expected our own setting instead: {ours}")
            if name not in PASSED_THROUGH:
                raise ValueError(
                    f"training_arguments: found {name!r}, which this trainer does not follow; expected some of "
                    f"{', '.join(PASSED_THROUGH)}"
                )

    def _check_trackers(self) -> None:
        if self.debug or self.only_eval or self.report_to in ("none", "all"):
            return
        from transformers.integrations import get_available_reporting_integrations

        installed = get_available_reporting_integrations()
        for name in [self.report_to] if isinstance(self.report_to, str) else self.report_to:
            if name not in installed:
                raise ValueError(
                    f"report_to: found {name!r}, expected none, all, or what is installed of transformers' trackers "
                    f"({', '.join(installed) or 'nothing'})"
                )

    @property
    def output_dir(self) -> str:
        return os.path.join(self.save_path, self.name + ("-debug" if self.debug else ""))

    def curriculum(self) -> CurriculumConfig:
        """How rows are made."""
        names = CurriculumConfig.__dataclass_fields__
        return CurriculumConfig(**{name: getattr(self, name) for name in names})

    def schedule(self) -> StageSchedule:
        """Which stage each epoch has. The last stage is the one past max_latent_stage, which drops all language."""
        staged = METHODS[self.method].stages == "all"
        return StageSchedule(
            last_stage=self.max_latent_stage + 1 if staged else 0,
            epochs_per_stage=self.epochs_per_stage,
            num_epochs=self.num_epochs,
            first_stage_epochs=self.first_stage_epochs,
            first_epoch=min(self.resume, self.num_epochs - 1) if self.only_eval else self.resume,
            final_epochs=self.final_epochs,
            advance_at=self.advance_at,
            reset_optimizer=self.reset_optimizer,
        )

    def limits(self) -> tuple[int | None, int | None]:
        """How many training and validation problems are read; None: all."""
        return DEBUG_PROBLEMS if self.debug else (None, self.eval_examples)

    def answer_length(self) -> int:
        """max_new_tokens, or the official default for this data."""
        return self.max_new_tokens or (64 if "gsm" in (self.val_path or "") else 128)

    def to_training_arguments(self, layer_class: str | None = None) -> TrainingArguments:
        """The arguments of transformers.Trainer for these settings; layer_class: the class of the layers FSDP wraps."""
        import torch
        from transformers import TrainingArguments
        from transformers.training_args import trainer_log_levels

        os.environ.setdefault("WANDB_PROJECT", self.project)
        saving = "no" if self.debug else "epoch"
        chosen: dict[str, Any] = {
            "output_dir": self.output_dir,
            "run_name": self.name,
            "project": self.project,
            "seed": self.seed,
            "use_cpu": self.device == "cpu" or not torch.cuda.is_available(),
            "per_device_train_batch_size": self.batch_size_training,
            "gradient_accumulation_steps": self.gradient_accumulation_steps,
            "num_train_epochs": sum(self.schedule().epochs_by_count().values()),
            "learning_rate": self.lr,
            "weight_decay": self.weight_decay,
            "adam_beta1": self.adam_beta1,
            "adam_beta2": self.adam_beta2,
            "max_grad_norm": self.max_grad_norm,
            "warmup_steps": self.warmup_steps,
            "bf16": self.precision == "bf16",
            "fp16": self.precision == "fp16",
            "eval_strategy": "epoch" if self.val_path else "no",
            "save_strategy": saving,
            "logging_steps": self.logging_steps,
            "report_to": "none" if self.debug else self.report_to,
            "dataloader_num_workers": self.num_workers,
            "dataloader_pin_memory": self.device != "cpu",
            "disable_tqdm": True,  # we bring our own progress bar
            "logging_nan_inf_filter": False,  # it synchronises with the device in every step
            "remove_unused_columns": False,
            "ddp_find_unused_parameters": False,  # every step uses all: compute_loss
        }
        if self.fsdp:
            chosen["fsdp"] = True
            chosen["fsdp_config"] = {"version": 2, "transformer_layer_cls_to_wrap": [layer_class]}
        wrong = set(self.training_arguments) - set(TrainingArguments.__dataclass_fields__)
        if wrong:
            raise ValueError(
                f"training_arguments: found {sorted(wrong)[0]!r}, which transformers.TrainingArguments lacks"
            )
        levels = [*trainer_log_levels]
        for name in ("log_level", "log_level_replica"):
            level = self.training_arguments.get(name, levels[0])
            if level not in levels:
                raise ValueError(f"training_arguments: found {name} {level!r}, expected one of {', '.join(levels)}")
        arguments = TrainingArguments(**chosen, **self.training_arguments)
        if arguments.n_gpu > 1:  # torchrun uses several; transformers' DataParallel can split only padded batches
            arguments._n_gpu = 1
        if self.fsdp and arguments.world_size == 1:
            raise ValueError("fsdp: found one process, expected several to shard over, started by torchrun")
        return arguments

    def to_dict(self) -> dict[str, Any]:
        """For run.json and comparisons."""
        return asdict(self)
