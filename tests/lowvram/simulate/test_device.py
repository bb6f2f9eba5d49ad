"""The simulated GPU: what lives on it and for how long, what is copied, what fails."""

from __future__ import annotations

import numpy as np
import psutil
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lowvram.loading.encoders import swap_text_linears
from lowvram.runtime import StageLog
from lowvram.simulate.device import CUBLAS_WORKSPACE_BYTES, SimulatedDevice
from lowvram_kernels.modules import swap_linear
from lowvram_quantize.format import Artifact
from lowvram_quantize.shape_artifact import write_shape_artifact

MIB, GIB = 1 << 20, 1 << 30
META = torch.device("meta")


@pytest.fixture(params=[False, True], ids=["grad", "inference"])
def gpu(request):
    with SimulatedDevice(cublas_workspace_bytes=0) as device, torch.inference_mode(request.param):
        yield device


def floats(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(*shape, dtype=dtype, device=META)


# --- lifetimes


def test_a_tensor_takes_memory_until_its_last_reference_goes(gpu):
    x = floats(1 << 20)
    other = x
    assert gpu.allocated == 4 * MIB
    del x
    assert gpu.allocated == 4 * MIB
    del other
    assert (gpu.allocated, gpu.peak_allocated, gpu.reserved) == (0, 4 * MIB, 20 * MIB)


def test_views_take_no_memory_and_keep_their_base_alive(gpu):
    x = floats(4, 1 << 20)
    view = x.view(2, 2, -1)[1:].transpose(0, 1)
    alias = x.detach()
    assert gpu.allocated == 16 * MIB
    del x, alias
    assert gpu.allocated == 16 * MIB
    del view
    assert gpu.allocated == 0


def test_in_place_operations_take_no_memory(gpu):
    x, y = floats(1 << 20), floats(1 << 20)
    gpu.reset_peaks()
    x.mul_(2).add_(y)
    torch.add(x, y, out=y)
    x[: 1 << 19].copy_(y[1 << 19 :])
    assert gpu.peak_allocated == gpu.allocated == 8 * MIB


def test_the_peak_is_of_what_lives_at_once(gpu):
    x = floats(1 << 20)
    x = (x + 1) * 2  # x and the sum; then x, the sum and the product
    assert gpu.peak_allocated == 12 * MIB
    gpu.reset_peaks()
    x = x + 1
    assert gpu.peak_allocated == 8 * MIB


def test_what_a_composite_operation_holds_in_between_counts(gpu):
    x = floats(1 << 20, dtype=torch.bfloat16)
    gpu.reset_peaks()
    F.layer_norm(x.view(1 << 10, 1 << 10).float(), (1 << 10,))
    # bfloat16 and float32 rows, and float32 rows with a mean and a factor each.
    assert gpu.peak_allocated == 2 * MIB + 2 * 4 * MIB + 2 * 4096


def test_a_module_keeps_its_parameters(gpu):
    layer = nn.Linear(1, 1, bias=False)
    layer.weight = nn.Parameter(floats(1 << 20).view(1 << 10, 1 << 10), requires_grad=False)
    assert gpu.allocated == 4 * MIB
    layer.weight = nn.Parameter(floats(1 << 10, 1 << 9), requires_grad=False)
    assert gpu.allocated == 2 * MIB


def test_repeated_operations_count_every_time(gpu):
    x = floats(1 << 20)
    kept = [torch.exp(x) for _ in range(5)]
    assert gpu.allocated == 24 * MIB
    assert gpu.kernel_count == 6
    assert len({t.untyped_storage()._cdata for t in kept}) == 5


def test_remembered_outcomes_depend_on_all_that_matters(gpu):
    x = floats(2, 3)
    for _ in range(2):
        assert (x + 1).dtype is torch.float32
        assert (x.to(torch.int32) + 1).dtype is torch.int32
        assert (x.to(torch.int32) + 1.0).dtype is torch.float32
        assert (x + floats(4, 1, 1)).shape == (4, 2, 3)
        assert (x + floats(4, 1, 1, dtype=torch.float64)).dtype is torch.float64
        assert x.sum(0).shape == (3,)
        assert x.sum(1).shape == (2,)
        assert (x.t() * 2).stride() == (1, 3)
        values, indices = x.topk(2, dim=1)
        assert (values.shape, indices.dtype) == ((2, 2), torch.int64)
        assert torch.cat([x, x]).shape == (4, 3)
        assert torch.cat([x, x], dim=1).shape == (2, 6)


def test_what_is_outside_the_device_is_not_touched():
    with SimulatedDevice() as gpu:
        torch.ones(1000).mul_(3)
        assert (gpu.allocated, gpu.kernel_count) == (0, 0)
    floats(1000).add_(1)
    assert gpu.kernel_count == 0


# --- placeholders


def test_weights_that_are_to_come_are_no_memory(gpu):
    with torch.device("meta"):
        layer = nn.Sequential(nn.Linear(1000, 1000), nn.Conv3d(8, 8, 3))
        swap_linear(layer, "0", torch.int8)
    nn.Linear(1000, 1000, device="meta").bfloat16()
    assert gpu.peak_allocated == 0
    layer.get_submodule("0").weight = nn.Parameter(
        torch.empty(1000, 1000, dtype=torch.int8, device=META), requires_grad=False
    )
    assert gpu.allocated == 1000448
    torch.empty(1000, 1000, device=META)
    assert gpu.peak_allocated == 1000448 + 4000256


def test_what_was_there_before_counts_from_when_it_is_used():
    x = torch.empty(1 << 20, device=META)
    with SimulatedDevice() as gpu:
        assert gpu.allocated == 0
        y = x + 1
        assert gpu.allocated == 8 * MIB
        del x, y
        assert gpu.allocated == 0


# --- copies


def test_copies_to_the_host_are_zeros_of_the_right_kind(gpu):
    x = floats(3, 4) + 5
    for copied in (x.cpu(), x.to("cpu"), x.to("cpu", torch.float64), x.half().cpu()):
        assert copied.device.type == "cpu"
        assert copied.shape == (3, 4)
        assert not copied.any()
    assert x.to("cpu", torch.float64).dtype is torch.float64
    assert np.array_equal(x.cpu().numpy(), np.zeros((3, 4), np.float32))


def test_bytes_across_are_counted_in_the_dtype_that_crosses(gpu):
    x = torch.ones(1000).to(META)
    assert (gpu.h2d_bytes, gpu.d2h_bytes) == (4000, 0)
    torch.ones(1000).to(META, torch.bfloat16)  # changed on the host
    assert gpu.h2d_bytes == 6000
    x.to("cpu", torch.bfloat16)  # changed on the device
    assert gpu.d2h_bytes == 2000
    x.bfloat16().cpu()
    assert gpu.d2h_bytes == 4000
    x.to(META).to("meta", torch.float64)
    torch.ones(10).to("cpu", torch.float64)
    assert (gpu.h2d_bytes, gpu.d2h_bytes) == (6000, 4000)


def test_copies_into_what_is_there(gpu):
    host, x = torch.ones(1000), floats(1000)
    x.copy_(host)
    x[:10].copy_(host[:10])
    assert (gpu.h2d_bytes, gpu.d2h_bytes) == (4040, 0)
    host[:500].copy_(x[:500])
    assert gpu.d2h_bytes == 2000
    assert host.sum() == 1000  # left alone
    x.copy_(floats(1000))
    assert (gpu.h2d_bytes, gpu.d2h_bytes) == (4040, 2000)


def test_copies_that_change_the_dtype_or_the_order_take_memory_for_a_while(gpu):
    x = floats(1 << 10, 1 << 10)
    gpu.reset_peaks()
    x.cpu()
    assert gpu.peak_allocated == 4 * MIB
    x.to("cpu", torch.float64)
    assert gpu.peak_allocated == 12 * MIB
    gpu.reset_peaks()
    x.t().copy_(torch.ones(1 << 10, 1 << 10))
    assert (gpu.peak_allocated, gpu.allocated) == (8 * MIB, 4 * MIB)


def test_host_memory_behind_a_copy_stays_untouched(gpu):
    before = psutil.Process().memory_info().rss
    host = [torch.empty(GIB, dtype=torch.uint8) for _ in range(20)]
    slot = torch.empty(GIB, dtype=torch.uint8, device=META)
    for buffer in host:
        slot.copy_(buffer)
        buffer[: GIB // 2].copy_(slot[: GIB // 2])
    assert (gpu.h2d_bytes, gpu.d2h_bytes) == (20 * GIB, 10 * GIB)
    assert psutil.Process().memory_info().rss - before < 100 * MIB


# --- what depends on values


def test_equality_is_not_known_and_answered_with_no(gpu):
    x = floats(10)
    assert not torch.equal(x, x)


@pytest.mark.parametrize("ask", [bool, float, lambda t: t.item(), lambda t: [0, 1][t.int()], lambda t: t.nonzero()])
def test_other_questions_for_values_are_refused(gpu, ask):
    with pytest.raises(RuntimeError, match="asks for a value of a tensor on the simulated device"):
        ask(floats(1).sum())


# --- operations


def test_attention_takes_what_the_fused_kernels_take(gpu):
    q, k = floats(1, 40, 1024, 128, dtype=torch.bfloat16), floats(1, 40, 8192, 128, dtype=torch.bfloat16)
    before = gpu.allocated
    gpu.reset_peaks()
    out = F.scaled_dot_product_attention(q, k, k)
    assert (out.shape, out.dtype) == (q.shape, torch.bfloat16)
    assert out.transpose(1, 2).is_contiguous()
    assert gpu.allocated - before == q.nbytes
    assert gpu.peak_allocated - before == q.nbytes + 4 * 40 * 1024


def test_8_bit_products_run(gpu):
    x, w = floats(64, 128, dtype=torch.int8), floats(256, 128, dtype=torch.int8)
    assert torch._int_mm(x, w.t()).dtype is torch.int32
    x, w = x.float().to(torch.float8_e4m3fn), w.float().to(torch.float8_e4m3fn)
    scales = floats(64, 1), floats(1, 256)
    out = torch._scaled_mm(x, w.t(), *scales, out_dtype=torch.bfloat16, use_fast_accum=False)
    assert (out.shape, out.dtype) == ((64, 256), torch.bfloat16)


def test_cublas_takes_its_workspace_once():
    with SimulatedDevice() as gpu:
        x = floats(8, 8)
        assert gpu.allocated == 512
        y = x @ x
        z = y @ x
        assert gpu.allocated == 3 * 512 + CUBLAS_WORKSPACE_BYTES
        del x, y, z
        assert gpu.allocated == CUBLAS_WORKSPACE_BYTES


@pytest.mark.parametrize("precision", ["int8", "nf4"])
def test_the_text_encoders_linears_dequantize_on_the_device(gpu, tmp_path, precision):
    artifact = Artifact.open(write_shape_artifact(tmp_path / "p", preset="tiny", text_encoder=precision))
    component = artifact.component("text_encoder")
    tensors = {}
    for slab in component.slab_names:
        tensors |= component.views(slab, component.read_slab(slab).to(META))
    name = component.quantized_names[0]
    path, (rows, columns) = name.removesuffix(".weight"), (32, 32)
    model = nn.Module()
    with torch.device("meta"):
        parent = model
        for part in path.split(".")[:-1]:
            parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        parent.add_module(path.rpartition(".")[2], nn.Linear(columns, rows, bias=False))
    component.facts["tensors"] = {name: component.facts["tensors"][name]}
    swap_text_linears(model, component, tensors, torch.bfloat16)
    x = floats(1, 7, columns, dtype=torch.bfloat16)
    before = gpu.kernel_count
    with torch.no_grad():
        out = model.get_submodule(path)(x)
    assert (out.shape, out.dtype) == ((1, 7, rows), torch.bfloat16)
    assert gpu.kernel_count - before >= 2  # the weight in full, then the product


def test_kernels_of_a_generation_are_counted(gpu):
    pytest.importorskip("triton", reason="triton is not installed: its kernels cannot be launched")
    from lowvram_kernels.rows import quantize_rows

    x = floats(1 << 10, 1 << 10)
    with SimulatedDevice(generation=89) as other:
        q, scale = quantize_rows(x, torch.int8)
        assert other.kernel_count == 1
        assert other.peak_allocated == other.allocated == q.nbytes + scale.nbytes
    before = gpu.kernel_count
    quantize_rows(x, torch.int8)
    assert gpu.kernel_count > before + 1  # meta is itself again: PyTorch's


# --- a full device


def test_a_full_device_raises_what_torch_raises():
    with SimulatedDevice(capacity=100 * MIB) as gpu:
        x = floats(20 << 20)
        with pytest.raises(torch.cuda.OutOfMemoryError, match=f"tried to allocate {80 * MIB} bytes; {80 * MIB} of"):
            x * 2
        with pytest.raises(torch.cuda.OutOfMemoryError):
            torch.ones(20 << 20).to(META)
        x.mul_(2)
        assert gpu.allocated == 80 * MIB
        del x
        assert floats(24 << 20).numel() == 24 << 20
        assert gpu.reserved == 96 * MIB


def test_cached_memory_goes_back_when_asked():
    with SimulatedDevice() as gpu:
        floats(20 << 20)
        assert gpu.reserved == 80 * MIB
        gpu.empty_cache()
        assert gpu.reserved == 0


# --- stages


def test_stages_have_the_simulated_peaks():
    with SimulatedDevice() as gpu:
        log = StageLog(gpu.engine)
        with log.stage("first"):
            kept = floats(20 << 20)
            floats(10 << 20)
        with log.stage("second"):
            floats(1 << 20)
        del kept
    first, second = log.to_json()
    assert (first["peak_vram_allocated_bytes"], first["peak_vram_reserved_bytes"]) == (120 * MIB, 120 * MIB)
    assert (second["peak_vram_allocated_bytes"], second["peak_bytes"]) == (84 * MIB, 120 * MIB)
