"""Trains the model: python -m evals.small_math.train --out DIR

DIR/bf16 is the checkpoint, with its tokenizer, as vLLM and transformers read it; DIR/log.json has the settings, the
losses and the accuracies; DIR/state.pt is what the same command goes on from after an interruption.

Problems are made while it trains, in rows of few-shot prompts.
"""

import argparse
import json
import math
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F

from evals.sides import Progress
from evals.small_math import data, generate, tokenizer
from evals.small_math.model import Model, Operand, Sizes, as_is, nvfp4

# Loss of a token: those of answers count fully, those of questions, which nothing could foresee, little.
_QUESTION_WEIGHT = 0.1
_BALANCE_WEIGHT = 0.01
_WARMUP = 200
_LOG_EVERY = 50
_TEST_ROWS = 100


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m evals.small_math.train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder, made where it is missing")
    parser.add_argument("--steps", type=int, default=6000, help="default: %(default)s")
    parser.add_argument("--rows", type=int, default=64, help="of a step; default: %(default)s")
    parser.add_argument("--length", type=int, default=832, help="tokens of a row; default: %(default)s")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="highest; default: %(default)s")
    parser.add_argument("--weight-decay", type=float, default=0.1, help="default: %(default)s")
    parser.add_argument("--layers", type=int, default=Sizes.num_layers, help="default: %(default)s")
    parser.add_argument("--hidden-size", type=int, default=Sizes.hidden_size, help="default: %(default)s")
    parser.add_argument("--expert-size", type=int, default=Sizes.moe_intermediate_size, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--test", type=int, default=1000, help="test problems of each kind; default: %(default)s")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 1),
                        help="processes that make problems; default: %(default)s")  # fmt: skip
    parser.add_argument("--save-every", type=float, default=60, help="seconds; default: %(default)s")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    options = parser.parse_args(arguments)
    for name in ("steps", "rows", "length", "layers", "test", "workers"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} takes a whole number from 1 on, got {getattr(options, name)}")
    for name in ("hidden_size", "expert_size"):
        if getattr(options, name) < 128 or getattr(options, name) % 128:
            parser.error(f"--{name.replace('_', '-')} takes a multiple of 128, got {getattr(options, name)}")
    return options


class _Batches(torch.utils.data.Dataset):
    """Item: the batch of that step."""

    def __init__(self, options: argparse.Namespace):
        self._options = options

    def __len__(self) -> int:
        return self._options.steps

    def __getitem__(self, step: int) -> tuple[torch.Tensor, ...]:
        options = self._options
        rows = data.training_rows(options.seed, step, options.rows, options.length)
        return torch.from_numpy(rows.inputs), torch.from_numpy(rows.targets), torch.from_numpy(rows.answers)


class Trainer:
    def __init__(self, options: argparse.Namespace):
        torch.manual_seed(options.seed)
        torch.set_float32_matmul_precision("high")
        self.options = options
        # A multiple of 128, for kernels that take no other; the rest of the ids are never used.
        vocab_size = -(-tokenizer.vocabulary_size() // 128) * 128
        self.sizes = Sizes(
            vocab_size,
            hidden_size=options.hidden_size,
            moe_intermediate_size=options.expert_size,
            num_layers=options.layers,
        )
        self.cuda = options.device.startswith("cuda")
        self.model = Model(self.sizes).to(options.device)
        matrices = [parameter for parameter in self.model.parameters() if parameter.ndim == 2]
        others = [parameter for parameter in self.model.parameters() if parameter.ndim != 2]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": options.weight_decay}, {"params": others, "weight_decay": 0.0}],
            lr=options.learning_rate,
            betas=(0.9, 0.95),
            fused=self.cuda,
        )
        self.loss = _loss
        if self.cuda:
            for layer in self.model.layers:
                layer.compile(dynamic=False)
            self.loss = torch.compile(_loss, dynamic=False)
        self.step = 0
        self.history: list[dict[str, float]] = []

    # -- an interruption and what follows

    @property
    def _settings(self) -> dict:
        ignored = ("out", "workers", "save_every", "device", "test")
        return {key: value for key, value in vars(self.options).items() if key not in ignored}

    def save(self) -> None:
        file = self.options.out / "state.pt"
        state = {
            "settings": self._settings,
            "step": self.step,
            "history": self.history,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        torch.save(state, file.with_suffix(".new"))
        file.with_suffix(".new").rename(file)

    def resume(self) -> None:
        """Raises ValueError where the state belongs to other settings."""
        file = self.options.out / "state.pt"
        if not file.exists():
            return
        state = torch.load(file, map_location=self.options.device)
        differ = sorted(key for key, value in self._settings.items() if state["settings"].get(key) != value)
        if differ:
            raise ValueError(f"{file} was made with another {', '.join(differ)}: remove it, or name another --out")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.history = state["step"], state["history"]

    # -- training

    def _rate(self, step: int) -> float:
        rest = max(1, self.options.steps - _WARMUP)
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, max(0, step - _WARMUP) / rest)))
        return self.options.learning_rate * min(1.0, (step + 1) / _WARMUP) * cosine

    def train(self) -> None:
        options = self.options
        loader = torch.utils.data.DataLoader(
            _Batches(options),
            batch_size=None,
            sampler=range(self.step, options.steps),
            num_workers=options.workers,
            prefetch_factor=4,
            pin_memory=self.cuda,
        )
        began = saved = time.monotonic()
        first = self.step
        with Progress("training") as progress:
            for batch in loader:
                loss, answer_loss = self._update(*batch)
                self.step += 1
                if self.step % _LOG_EVERY == 0 or self.step == options.steps:
                    rate = (self.step - first) * options.rows * options.length / (time.monotonic() - began)
                    entry = {"step": self.step, "loss": loss.item(), "answer loss": answer_loss.item()}
                    self.history.append({**entry, "tokens/s": rate, "seconds": time.monotonic() - began})
                    doing = f"loss of answers {entry['answer loss']:.4f}, {rate / 1e6:.2f} M tokens/s"
                    progress.show({"doing": doing, "done": self.step, "total": options.steps})
                if time.monotonic() - saved > options.save_every:
                    self.save()
                    saved = time.monotonic()

    def _update(self, inputs: torch.Tensor, targets: torch.Tensor, answers: torch.Tensor) -> tuple[torch.Tensor, ...]:
        options = self.options
        inputs, targets, answers = (x.to(options.device, non_blocking=True) for x in (inputs, targets, answers))
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate(self.step)
        with torch.autocast(options.device.split(":")[0], torch.bfloat16):
            hidden, balance = self.model.hidden(inputs.long())
            loss, answer_loss = self.loss(self.model, hidden, targets.long(), answers)
        (loss + _BALANCE_WEIGHT * balance).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach(), answer_loss.detach()

    # -- afterwards

    def accuracies(self) -> dict[str, dict[str, float]]:
        """By operands and test set: share of problems whose whole answer is what the bf16 weights say, token by token.

        That is a lower bound of strict-match: another text with the same number counts as wrong here.
        """
        sets = {
            "test": generate.test_set(self.options.seed, self.options.test),
            "test_new_templates": generate.take(self.options.seed, generate.NEW_TEMPLATE, self.options.test),
        }
        rounded = Model(self.sizes).to(self.options.device)
        rounded.load(self.model.tensors())
        rounded.to(torch.bfloat16)
        return {
            name: {key: accuracy(rounded, problems, operand) for key, problems in sets.items()}
            for name, operand in (("bf16", as_is), ("nvfp4", nvfp4))
        }

    def write(self) -> Path:
        folder = self.options.out / "bf16"
        write_checkpoint(folder, self.model)
        return folder


def _loss(
    model: Model, hidden: torch.Tensor, targets: torch.Tensor, answers: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted mean of the cross-entropy, and its mean over answers."""
    losses = F.cross_entropy(model.logits(hidden).float().flatten(0, 1), targets.flatten(), reduction="none")
    marks = answers.flatten().float()
    weights = marks + _QUESTION_WEIGHT * (1 - marks)
    return (losses * weights).sum() / weights.sum(), (losses * marks).sum() / marks.sum().clamp_min(1)


@torch.no_grad()
def accuracy(
    model: Model, problems: list[generate.Problem], operand: Operand = as_is, shots: int = data.SHOTS
) -> float:
    """Share whose worked answer, after those of `shots` others, is the most likely text, token by token. Greedy
    decoding gives exactly this text then."""
    right = 0
    dtype, device = model.embedding.dtype, model.embedding.device
    rows = data.prompt_rows(problems, 192 * (shots + 1), shots)
    for start in range(0, len(problems), _TEST_ROWS):
        part = slice(start, start + _TEST_ROWS)
        ids, targets = (torch.from_numpy(x[part]).long().to(device) for x in (rows.inputs, rows.targets))
        answers = torch.from_numpy(rows.answers[part]).to(device)
        hidden, _ = model.hidden(ids, operand, dtype)
        wrong = (model.logits(hidden).argmax(-1) != targets) & answers
        right += int((~wrong.any(-1)).sum())
    return right / len(problems)


def write_checkpoint(folder: Path, model: Model) -> None:
    """config.json, the tokenizer and the weights in bfloat16."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    config = model.sizes.config(tokenizer.EOS_ID)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": tokenizer.EOS_ID}, indent=2) + "\n")
    tokenizer.write(folder, model.sizes.max_positions)
    tensors = {name: tensor.cpu() for name, tensor in model.tensors().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    began = time.monotonic()
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        trainer = Trainer(options)
        trainer.resume()
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        trainer.train()
    except KeyboardInterrupt:
        trainer.save()
        print(f"interrupted after step {trainer.step}: the same command goes on from here", file=sys.stderr)
        return 130
    folder = trainer.write()
    log = {
        "settings": trainer._settings,
        "sizes": asdict(trainer.sizes),
        "parameters": sum(parameter.numel() for parameter in trainer.model.parameters()),
        "device": torch.cuda.get_device_name() if trainer.cuda else "CPU",
        "torch": torch.__version__,
        "accuracy, token by token": trainer.accuracies(),
        "seconds": time.monotonic() - began,
        "history": trainer.history,
    }
    (options.out / "log.json").write_text(json.dumps(log, indent=1) + "\n")
    shown = {key: log[key] for key in ("parameters", "accuracy, token by token", "seconds")}
    print(f"{json.dumps(shown)}\n{folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
