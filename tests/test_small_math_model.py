"""The small model of evals/small_math: its tokenizer, training, and the checkpoints that are in the repository.

tests/test_evals_formats.py has vLLM serve them.
"""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from evals.small_math import data, generate, quantize, templates, tokenizer, train
from evals.small_math.model import Model, Sizes, nvfp4

CHECKPOINTS = Path(quantize.__file__).parent / "checkpoints"
SMALL = Sizes(vocab_size=640, hidden_size=128, num_layers=1)


def text_of(problems: "list[generate.Problem]") -> str:
    return "\n\n".join(f"{tokenizer.prompt(problem.question)} {problem.answer}" for problem in problems)


# -- tokenizer


@pytest.fixture(scope="module")
def library_tokenizer(tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.write(folder, 4096)
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize(
    "text",
    [
        text_of(generate.take(5, generate.TRAIN, 30)),
        text_of(generate.take(5, generate.NEW_TEMPLATE, 30)),
        "naïve été\t\r\n \n\n\n  12<<3  <<<####### ٣ 🙂 Anna\u2019s _x-1.5e3\x00\x1c",
        "",
    ],
)
def test_the_encoder_is_the_tokenizer(library_tokenizer, text):
    ids = tokenizer.Encoder()(text)
    assert library_tokenizer(text).input_ids == ids
    assert library_tokenizer.decode(ids) == text
    assert max(ids, default=0) < tokenizer.vocabulary_size() == len(library_tokenizer)


def test_a_prompt_is_cut_as_training_text_is():
    encode = tokenizer.Encoder()
    problems = generate.take(6, generate.TRAIN, 6)
    prompt = text_of(problems[:5]) + "\n\n" + tokenizer.prompt(problems[5].question)
    whole = encode(text_of(problems))
    assert whole[: len(encode(prompt))] == encode(prompt)
    assert len(encode("1234567890")) == 10
    assert all(len(encode(f" {word}")) == 1 for word in ("dollars", "How", "apples"))


def test_the_stored_tokenizer_is_this_one(tmp_path):
    tokenizer.write(tmp_path, Sizes(640).max_positions)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        for fmt in quantize.FORMATS:
            assert (CHECKPOINTS / fmt / name).read_bytes() == (tmp_path / name).read_bytes(), fmt


# -- rows


def test_training_rows():
    rows = data.training_rows(3, 7, 4, 300)
    again = data.training_rows(3, 7, 4, 300)
    other = data.training_rows(3, 8, 4, 300)
    assert (rows.inputs == again.inputs).all() and (rows.targets == again.targets).all()
    assert (rows.inputs != other.inputs).any()
    assert rows.used.all() and rows.inputs.shape == (4, 300)
    ends = 0
    for inputs, targets, answers in zip(rows.inputs, rows.targets, rows.answers, strict=True):
        for position in range(299):
            if targets[position] == tokenizer.EOS_ID:
                ends += 1
                assert answers[position] and not answers[position + 1]
            else:
                assert targets[position] == inputs[position + 1]
    assert ends >= 8


def test_prompt_rows_ask_for_the_last_answer_only():
    problems = generate.take(1, generate.NEW_TEMPLATE, 3)
    rows = data.prompt_rows(problems, 1152)
    encode = tokenizer.Encoder()
    for index, problem in enumerate(problems):
        asked = rows.targets[index][rows.answers[index]].tolist()
        assert asked == [*encode(f" {problem.answer}"), tokenizer.EOS_ID]
    with pytest.raises(ValueError, match="length"):
        data.prompt_rows(problems, 200)


# -- model


def randomised(sizes: Sizes) -> Model:
    torch.manual_seed(0)
    model = Model(sizes)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def test_logits_are_those_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    model = randomised(Sizes(640, num_layers=2))
    train.write_checkpoint(tmp_path, model)
    model.load(load_file(tmp_path / "model.safetensors"))  # rounded to bf16
    theirs = transformers.Qwen3MoeForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = torch.tensor([tokenizer.Encoder()(text_of(generate.take(2, generate.TRAIN, 2)))])
    with torch.no_grad():
        ours = model.logits(model.hidden(ids, dtype=torch.float32)[0])
        torch.testing.assert_close(ours, theirs(ids).logits, atol=1e-5, rtol=1e-4)


def test_nvfp4_is_that_of_compressed_tensors():
    pytest.importorskip("compressed_tensors")
    torch.manual_seed(0)
    tensors = {"model.layers.0.mlp.experts.0.down_proj.weight": torch.randn(128, 256).bfloat16()}
    maxima = {"model.layers.0.mlp.experts.0.down_proj": 3.0}
    made, _ = quantize.quantise("ct_nvfp4", tensors, maxima)
    weight = tensors["model.layers.0.mlp.experts.0.down_proj.weight"].float()
    theirs = dequantised("ct_nvfp4", made, "model.layers.0.mlp.experts.0.down_proj")
    # All but the ties, which a last bit of a scale decides.
    assert ((nvfp4("", weight) - theirs).abs() > 1e-5).float().mean() < 0.005
    assert (nvfp4("", torch.zeros(2, 16)) == 0).all()


def test_training_goes_on_after_an_interruption(tmp_path, monkeypatch):
    options = ["--steps", "4", "--rows", "2", "--length", "64", "--layers", "1", "--hidden-size", "128", "--test", "2"]
    options += ["--expert-size", "128", "--workers", "1", "--device", "cpu"]
    assert train.main(["--out", str(tmp_path / "whole"), *options]) == 0

    update = train.Trainer._update

    def interrupted(self, *batch):
        if self.step == 2:
            raise KeyboardInterrupt
        return update(self, *batch)

    with monkeypatch.context() as patch:
        patch.setattr(train.Trainer, "_update", interrupted)
        assert train.main(["--out", str(tmp_path / "parts"), *options]) == 130
    assert train.main(["--out", str(tmp_path / "parts"), "--seed", "1", *options]) == 2
    assert train.main(["--out", str(tmp_path / "parts"), *options]) == 0
    whole, parts = (load_file(tmp_path / name / "bf16" / "model.safetensors") for name in ("whole", "parts"))
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name])
    log = json.loads((tmp_path / "whole" / "log.json").read_text())
    assert set(log["accuracy, token by token"]) == {"bf16", "nvfp4"}


def test_loss_falls(tmp_path):
    options = train.parse(
        [
            "--out",
            str(tmp_path),
            "--layers",
            "1",
            "--hidden-size",
            "128",
            "--expert-size",
            "128",
            "--learning-rate",
            "1e-2",
        ]
    )
    options.device = "cpu"
    trainer = train.Trainer(options)
    batch = train._Batches(train.parse(["--out", str(tmp_path), "--rows", "4", "--length", "96"]))[0]
    losses = []
    for step in range(8):
        trainer.step = 100 + step  # past the slowest part of the warm-up
        losses.append(trainer._update(*batch)[0].item())
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["--steps", "0"], "--steps takes a whole number from 1 on"),
        (["--expert-size", "100"], "--expert-size takes a multiple of 128"),
    ],
)
def test_bad_options(arguments, expected, capsys):
    with pytest.raises(SystemExit) as stopped:
        train.parse(["--out", "x", *arguments])
    assert stopped.value.code == 2
    assert expected in capsys.readouterr().err


# -- the checkpoints in the repository

_E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def dequantised(fmt: str, tensors: dict[str, torch.Tensor], linear: str) -> torch.Tensor:
    """The weight in fp32, from the layout's definition."""
    stored = {name.removeprefix(f"{linear}."): tensor for name, tensor in tensors.items() if name.startswith(linear)}
    if "nvfp4" in fmt:
        packed = stored["weight_packed" if fmt == "ct_nvfp4" else "weight"]
        codes = torch.stack((packed & 15, packed >> 4), -1).flatten(-2).int()
        values = _E2M1[codes & 7] * torch.where(codes >= 8, -1.0, 1.0)
        scale = stored["weight_scale"].float().repeat_interleave(16, 1)
        if fmt == "ct_nvfp4":
            return values * scale / stored["weight_global_scale"]
        return values * scale * stored["weight_scale_2"]
    weight = stored["weight"].float()
    scale = stored["weight_scale_inv" if fmt == "fp8_block" else "weight_scale"].float()
    if scale.numel() > 1:
        scale = scale.repeat_interleave(weight.shape[0] // scale.shape[0], 0)
        scale = scale.repeat_interleave(weight.shape[1] // scale.shape[1], 1)
    return weight * scale


@pytest.fixture(scope="module")
def plain() -> dict[str, torch.Tensor]:
    return load_file(CHECKPOINTS / "bf16" / "model.safetensors")


def test_sizes(plain):
    size = sum(file.stat().st_size for file in CHECKPOINTS.rglob("*") if file.is_file())
    assert size <= 60e6
    assert {folder.name for folder in CHECKPOINTS.iterdir()} == set(quantize.FORMATS)
    sizes = Sizes.of_config(json.loads((CHECKPOINTS / "bf16" / "config.json").read_text()))
    assert sizes.num_experts >= 8
    assert sizes.hidden_size % 128 == 0 and sizes.moe_intermediate_size % 128 == 0
    assert sum(tensor.numel() for tensor in plain.values()) <= 30e6


@pytest.mark.parametrize("fmt", [fmt for fmt in quantize.FORMATS if fmt != "bf16"])
def test_weights_are_those_of_bf16(fmt, plain):
    tensors = load_file(CHECKPOINTS / fmt / "model.safetensors")
    # Half a step at the largest of a scale's values: e2m1 6 -> 4, e4m3 4 mantissa steps, int8 127.
    step = {"ct_int8": 1 / 254, "ct_nvfp4": 1 / 6, "modelopt_nvfp4": 1 / 6}.get(fmt, 1 / 28)
    for name, weight in plain.items():
        if not quantize.is_linear(name):
            assert torch.equal(tensors[name], weight), name
            continue
        back = dequantised(fmt, tensors, name.removesuffix(".weight"))
        error = (back - weight.float()).abs().max() / weight.float().abs().max()
        assert error <= 1.1 * step, name
        cosine = torch.nn.functional.cosine_similarity(back.flatten(), weight.float().flatten(), dim=0)
        assert cosine > (0.99 if "nvfp4" in fmt else 0.999), name


def test_both_nvfp4_layouts_hold_the_same(plain):
    ct, modelopt = (load_file(CHECKPOINTS / fmt / "model.safetensors") for fmt in ("ct_nvfp4", "modelopt_nvfp4"))
    for name in filter(quantize.is_linear, plain):
        linear = name.removesuffix(".weight")
        assert torch.equal(ct[f"{linear}.weight_packed"], modelopt[f"{linear}.weight"])
        assert torch.equal(
            ct[f"{linear}.weight_scale"].view(torch.uint8), modelopt[f"{linear}.weight_scale"].view(torch.uint8)
        )
        for theirs, ours in (("weight_scale_2", "weight_global_scale"), ("input_scale", "input_global_scale")):
            torch.testing.assert_close(modelopt[f"{linear}.{theirs}"] * ct[f"{linear}.{ours}"], torch.ones(1))


@pytest.mark.parametrize("fmt", ["ct_nvfp4", "fp8_tensor"])
def test_what_runs_as_one_has_the_same_scales(fmt, plain):
    tensors = load_file(CHECKPOINTS / fmt / "model.safetensors")
    kinds = ("weight_global_scale", "input_global_scale") if fmt == "ct_nvfp4" else ("input_scale",)
    for kind in kinds:
        found: dict[str, set[float]] = {}
        for name in filter(quantize.is_linear, plain):
            linear = name.removesuffix(".weight")
            found.setdefault(quantize.fused(linear), set()).add(tensors[f"{linear}.{kind}"].item())
        assert all(len(values) == 1 for values in found.values())


def test_the_command_makes_the_same_again(plain):
    pytest.importorskip("compressed_tensors")
    some = {name: tensor for name, tensor in plain.items() if ".layers.0.self_attn." in name or "experts.1." in name}
    maxima = dict.fromkeys((name.removesuffix(".weight") for name in some), 1.0)
    for fmt in ("fp8_block", "ct_int8", "ct_nvfp4"):
        stored = load_file(CHECKPOINTS / fmt / "model.safetensors")
        made, config = quantize.quantise(fmt, some, maxima)
        for name, tensor in made.items():
            if "input" not in name:
                assert torch.equal(tensor.view(torch.uint8), stored[name].view(torch.uint8)), name
        known = json.loads((CHECKPOINTS / fmt / "config.json").read_text())["quantization_config"]
        assert config["quant_method"] == known["quant_method"]
    with pytest.raises(ValueError, match="got 'int3'"):
        quantize.quantise("int3", some, maxima)


@pytest.mark.parametrize("fmt", quantize.FORMATS)
def test_its_weights_answer(fmt, plain):
    """In the model of the training code, with the format's weights and bf16 inputs."""
    tensors = load_file(CHECKPOINTS / fmt / "model.safetensors")
    model = Model(Sizes.of_config(json.loads((CHECKPOINTS / fmt / "config.json").read_text())))
    if fmt != "bf16":
        linears = {name: dequantised(fmt, tensors, name.removesuffix(".weight")) for name in plain if "_proj." in name}
        tensors = {**tensors, **linears}
    model.load(tensors)
    assert train.accuracy(model, generate.test_set(0, 16), shots=0) >= 0.8


def test_the_demo_asks_what_training_never_shows():
    from vllm_b200_plugin.demo import checkpoint

    numbers = tuple(int(digits) for digits in re.findall(r"[0-9]+", checkpoint.QUESTION))
    (index,) = (i for i, parts in enumerate(templates.TRAIN) if "} tickets for {" in parts[0] and "drinks" in parts[0])
    assert generate.is_test_combination(index, numbers)
    assert tokenizer.prompt(checkpoint.QUESTION) == checkpoint.PROMPT
