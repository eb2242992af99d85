"""Profiles for GPUs that nobody measured for us: a roofline of the GPU's peaks and its architecture's efficiencies."""

from __future__ import annotations

from hetis.formats.dtypes import BYTES_PER_PARAMETER
from hetis.profiler.efficiency import Efficiencies, OpEfficiency, shipped
from hetis.solver.cluster import GpuType
from hetis.solver.errors import InvalidProblemError
from hetis.solver.profile import Fit, FitScope, Op, Profile, Provenance, Source

NVFP4_BYTES = BYTES_PER_PARAMETER["nvfp4"]


def modelled_profile(gpu: GpuType, efficiencies: Efficiencies | None = None) -> Profile:
    """Return the roofline of ``gpu``: the catalogue's peaks times ``efficiencies``, or those in the package if None.

    Raises:
        InvalidProblemError: no efficiencies are known for the architecture of ``gpu``.
    """
    efficiencies = efficiencies or shipped()
    arch = efficiencies.architectures.get(gpu.architecture)
    if arch is None:
        known = ", ".join(efficiencies.architectures)
        raise InvalidProblemError(f"{gpu.name}: no efficiencies for architecture {gpu.architecture!r}; known: {known}")
    calibrated = f"efficiencies of {arch.name} calibrated on "
    suffix = "" if arch.relative is None else f"; scaled from {arch.relative}"

    def own(op: Op, name: str, flops: float = gpu.fp16_flops, scope: FitScope | None = None) -> Fit:
        return _fit(op, arch.ops[name], gpu, flops=flops, scope=scope, before=calibrated, after=suffix)

    def of_link(op: Op, name: str) -> Fit:
        return _fit(op, efficiencies.links[name], gpu, flops=gpu.fp16_flops)

    has_nvlink = gpu.nvlink_bytes_per_s is not None
    fits = [
        own(Op.DENSE, "dense"),
        own(Op.PREFILL_ATTENTION, "prefill_attention"),
        own(Op.DECODE_ATTENTION, "decode_attention"),
        own(Op.ALL_REDUCE, "all_reduce_nvlink") if has_nvlink else of_link(Op.ALL_REDUCE, "all_reduce_pcie"),
        of_link(Op.TRANSFER, "transfer"),
        of_link(Op.STEP, "step"),
    ]
    if gpu.fp8_flops is not None:  # fp8 weights and activations on the fp8 matrix units
        fits.append(own(Op.DENSE, "dense_fp8", gpu.fp8_flops, FitScope(weight_bytes=1.0)))
        if matrix_flops(gpu, NVFP4_BYTES) > gpu.fp8_flops:
            name = "dense_nvfp4" if "dense_nvfp4" in arch.ops else "dense_fp8"
            fits.append(own(Op.DENSE, name, matrix_flops(gpu, NVFP4_BYTES), FitScope(weight_bytes=NVFP4_BYTES)))
    return Profile(
        gpu=gpu.name,
        usable_bytes=int(gpu.memory_bytes * efficiencies.memory.usable_ratio),
        reserve_bytes=efficiencies.memory.reserve_bytes,
        fits=tuple(fits),
    )


def matrix_flops(gpu: GpuType, weight_bytes: float | None) -> float:
    """Return the peak matrix rate for weights of ``weight_bytes`` each. None: 16 bits.

    Four-bit products run at twice the rate of eight-bit ones on the one architecture that has them.
    """
    if weight_bytes is None or weight_bytes > 1.0 or gpu.fp8_flops is None:
        return gpu.fp16_flops
    return gpu.fp8_flops * (2.0 if weight_bytes < 1.0 and gpu.architecture == "Blackwell" else 1.0)


def _fit(
    op: Op,
    efficiency: OpEfficiency,
    gpu: GpuType,
    *,
    flops: float,
    scope: FitScope | None = None,
    before: str = "",
    after: str = "",
) -> Fit:
    """Return ``efficiency`` at the peaks of ``gpu``. Its error is that for unseen GPUs unless this one was measured."""
    was_measured = gpu.name in efficiency.measured_on
    return Fit(
        op=op,
        pieces=tuple(piece.at(flops=flops, bytes_per_s=gpu.mem_bytes_per_s) for piece in efficiency.pieces),
        provenance=Provenance(
            source=Source.MODELLED,
            origin=f"roofline of {gpu.name}, {before}{efficiency.origin}{after}",
            held_out_mape=efficiency.held_out_mape if was_measured else efficiency.transfer_mape,
            range_error=None if was_measured else efficiency.range_error,
        ),
        scope=scope or FitScope(),
    )
