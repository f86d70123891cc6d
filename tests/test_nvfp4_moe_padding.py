"""NVFP4 experts whose gate and up need padding: what vLLM prepares for CUTLASS and FlashInfer has the same products."""

import types

import pytest
import torch

pytest.importorskip("vllm")

from test_nvfp4_cpu import linear, oracle, quantised  # noqa: F401 (fixtures)

from vllm_b200_plugin.integration import nvfp4_moe_padding
from vllm_b200_plugin.ops.nvfp4_quant import nvfp4_dequant

EXPERTS, HIDDEN = 3, 256
ONE = torch.tensor(1.0)


def checkpoint(size: int) -> dict[str, torch.Tensor]:
    """w13 and w2 of experts with `size` rows of gate and of up, and their scales."""
    (w13, w13_scale, _), (w2, w2_scale, _) = quantised(EXPERTS, 2 * size, HIDDEN), quantised(EXPERTS, HIDDEN, size)
    tensors = {"w13": w13, "w13_scale": w13_scale, "w2": w2, "w2_scale": w2_scale}
    ones = {name: torch.ones(EXPERTS) for name in ("w13_scale_2", "w2_scale_2", "a2_scale")}
    return tensors | ones | {"a13_scale": torch.ones(EXPERTS, 2)}


def rows_of(q: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Dequantised; the scale's tiles of 128 x 4, of 32 x 16 bytes each, are put back into rows."""
    experts, rows, columns = q.shape[0], scale.shape[1], scale.shape[2]
    tiles = scale.view(torch.uint8).view(experts, rows // 128, columns // 4, 32, 4, 4)
    plain = tiles.permute(0, 1, 4, 3, 2, 5).reshape(experts, rows, columns)[:, : q.shape[1], : q.shape[2] // 8]
    plain = plain.contiguous().view(torch.float8_e4m3fn)
    return torch.stack([nvfp4_dequant(*expert, ONE) for expert in zip(q, plain, strict=True)])


def layer() -> types.SimpleNamespace:
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation

    parallel = types.SimpleNamespace(enable_eplb=False, ep_size=1)
    config = types.SimpleNamespace(intermediate_size_per_partition=0, moe_parallel_config=parallel)
    return types.SimpleNamespace(activation=MoEActivation.SILU, moe_config=config)


@pytest.fixture
def padded(oracle, monkeypatch):  # noqa: F811
    theirs = getattr(oracle.prepare_nvfp4_moe_layer_for_fi_or_cutlass, "__wrapped__", None)
    monkeypatch.setattr(
        oracle, "prepare_nvfp4_moe_layer_for_fi_or_cutlass", theirs or oracle.prepare_nvfp4_moe_layer_for_fi_or_cutlass
    )
    monkeypatch.setattr(torch.Tensor, "cuda", lambda tensor: tensor)  # vLLM sends the scales there
    nvfp4_moe_padding.apply()
    return oracle


@pytest.mark.parametrize("backend", ["VLLM_CUTLASS", "FLASHINFER_CUTLASS"])
@pytest.mark.parametrize("size", [96, 112, 32])
def test_gate_and_up_are_padded_each_by_itself(padded, backend, size):
    tensors, found = checkpoint(size), layer()
    prepared = padded.prepare_nvfp4_moe_layer_for_fi_or_cutlass(
        backend=padded.NvFp4MoeBackend[backend], layer=found, is_act_and_mul=True, **tensors
    )
    w13, w13_scale, _, _, w2, w2_scale, *_ = prepared
    whole = -(-size // 64) * 64
    assert found.moe_config.intermediate_size_per_partition == whole
    assert w13.shape[1] == w13_scale.shape[1] == 2 * whole and w2.shape[2] * 2 == whole
    first, second = rows_of(w13, w13_scale).split(whole, 1)
    gate, up = (second, first) if backend == "FLASHINFER_CUTLASS" else (first, second)
    expected = [nvfp4_dequant(*e, ONE) for e in zip(tensors["w13"], tensors["w13_scale"], strict=True)]
    expected_gate, expected_up = torch.stack(expected).split(size, 1)
    assert torch.equal(gate[:, :size], expected_gate) and torch.equal(up[:, :size], expected_up)
    assert not gate[:, size:].any() and not up[:, size:].any()
    down = rows_of(w2, w2_scale)
    expected_down = [nvfp4_dequant(*e, ONE) for e in zip(tensors["w2"], tensors["w2_scale"], strict=True)]
    assert torch.equal(down[:, :, :size], torch.stack(expected_down)) and not down[:, :, size:].any()


def test_without_it_vllm_refuses(padded):
    theirs = padded.prepare_nvfp4_moe_layer_for_fi_or_cutlass.__wrapped__
    with pytest.raises(NotImplementedError, match="padding"):
        theirs(backend=padded.NvFp4MoeBackend.VLLM_CUTLASS, layer=layer(), is_act_and_mul=True, **checkpoint(96))


def test_what_needs_no_padding_is_left_alone(padded):
    tensors, found = checkpoint(128), layer()
    w13 = padded.prepare_nvfp4_moe_layer_for_fi_or_cutlass(
        backend=padded.NvFp4MoeBackend.VLLM_CUTLASS, layer=found, is_act_and_mul=True, **tensors
    )[0]
    assert w13 is tensors["w13"] and found.moe_config.intermediate_size_per_partition == 0
