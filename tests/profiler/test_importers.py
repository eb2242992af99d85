"""Other tools' tables: units and provenance are right, and wrong data are refused."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

from hetis.formats.errors import DocumentError
from hetis.formats.measurements import MeasuredOp
from hetis.profiler.importers import reading
from tools.simulator_tables import import_tables

GEMM = "device,gemm_dtype,m,n,k,latency_ms\n"
DECODE = "device,kernel_source,head_dim,num_heads,num_key_value_heads,batch_size,kv_len,latency_ms\n"
SPLITWISE = "model,hardware,prompt_size,batch_size,token_size,prompt_time_ms,token_time_ms,tensor_parallel\n"


def written(tmp_path: Path, text: str, name: str = "table.csv") -> Path:
    path = tmp_path / name
    path.write_bytes(gzip.compress(text.encode(), mtime=0) if name.endswith(".gz") else text.encode())
    return path


def message(form: str, *paths: Path) -> str:
    with pytest.raises(DocumentError) as caught:
        import_tables(form, paths)
    return str(caught.value)


def gemm_rows(factor: float = 1.0) -> str:
    """Return a hundred products at half the peak of an A100."""
    rows = [(m, n) for m in (1024, 2048, 4096, 8192) for n in range(1024, 26 * 1024, 1024)]
    return GEMM + "".join(
        f"NVIDIA A100-SXM4-80GB,bfloat16,{m},{n},4096,{factor * 1e3 * 2 * m * n * 4096 / 156e12:.6g}\n" for m, n in rows
    )


def test_aiconfigurator_s_extracts_name_gpu_engine_version_and_kernel(tmp_path: Path) -> None:
    path = written(tmp_path, DECODE + "NVIDIA H100 80GB HBM3,vllm_flash_attn_fa3,128,32,8,16,1025,0.05\n", "a.csv.gz")
    (measured,) = import_tables("aiconfigurator", [path])
    by = measured.provenance
    assert (measured.gpu, by.tool, by.engine, by.engine_version) == (
        "H100-SXM-80GB",
        "aiconfigurator-core 0.12.0",
        "vLLM",
        "0.24.0",
    )
    (table,) = measured.tables
    assert (table.op, table.kernel) == (MeasuredOp.DECODE_ATTENTION, "vllm_flash_attn_fa3")
    assert {name: column.tolist() for name, column in table.columns.items()} == {
        "query_heads": [32],
        "kv_heads": [8],
        "head_dim": [128],
        "batch": [16],
        "context_tokens": [1025],
        "seconds": [pytest.approx(5e-5)],
    }


def test_aiconfigurator_s_own_tables_count_the_context_as_isl_and_step(tmp_path: Path) -> None:
    header = (
        "framework,version,device,op_name,kernel_source,batch_size,isl,num_heads,num_key_value_heads,head_dim,"
        "beam_width,attn_dtype,kv_cache_dtype,step,latency\n"
    )
    row = "SGLang,0.5.1,NVIDIA L40S,{},flashinfer,4,{},32,8,128,1,bfloat16,{},{},0.1\n"
    rows = [row.format("generation_attention", 1, *rest) for rest in (("bfloat16", 511), ("fp8", 9))]
    decode = written(tmp_path, header + "".join(rows), "generation.txt")
    prefill = written(tmp_path, header + row.format("context_attention", 512, "bfloat16", 0), "context.txt")
    (measured,) = import_tables("aiconfigurator", [decode, prefill])
    assert str(measured.provenance) == "aiconfigurator-core (Apache-2.0), SGLang 0.5.1"
    tables = {table.op: table for table in measured.tables}
    assert tables[MeasuredOp.DECODE_ATTENTION].numbers("context_tokens").tolist() == [512]
    assert tables[MeasuredOp.PREFILL_ATTENTION].numbers("tokens").tolist() == [512]
    assert measured.notes == ("attention rows with kv_cache_dtype other than 16 bits are left out",)


@pytest.mark.parametrize("first", ["generation_attention", "context_attention"])
def test_one_table_of_aiconfigurator_may_have_prefill_and_decode(first: str, tmp_path: Path) -> None:
    header = "framework,version,device,op_name,batch_size,isl,num_heads,num_key_value_heads,head_dim,step,latency\n"
    rows = {
        name: f"SGLang,0.5.1,NVIDIA L40S,{name},4,{isl},32,8,128,{step},0.1\n"
        for name, isl, step in (("generation_attention", 1, 511), ("context_attention", 512, 256))
    }
    text = rows.pop(first) + "".join(rows.values())
    (measured,) = import_tables("aiconfigurator", [written(tmp_path, header + text)])
    tables = {table.op: table for table in measured.tables}
    assert tables[MeasuredOp.DECODE_ATTENTION].numbers("context_tokens").tolist() == [512]
    assert tables[MeasuredOp.PREFILL_ATTENTION].numbers("past_tokens").tolist() == [256]
    wrong = written(tmp_path, header + text.replace(",32,8,", ",30,8,"), "wrong.csv")
    assert "num_key_value_heads: is 8, must divide the 30 of num_heads" in message("aiconfigurator", wrong)


def test_only_all_reduces_of_vidur_are_all_reduces(tmp_path: Path) -> None:
    rows = "a100_dgx,all_reduce,2,2,2048,0.0431\na100_dgx,all_gather,2,2,2048,0.02\n"
    header = "topology,collective,num_workers,devices_per_node,bytes,median_ms\n"
    (measured,) = import_tables("vidur", [written(tmp_path, header + rows)])
    assert [len(table.numbers("num_bytes")) for table in measured.tables] == [1]
    assert measured.notes == ("all_gather rows are left out: the cost model has no such operator",)


@pytest.mark.parametrize(("dtype", "num_bytes"), [("half", 2), ("int8", 1), ("float", 4)])
@pytest.mark.parametrize("column", ["nccl_dtype", "allreduce_dtype"])
def test_messages_of_aiconfigurator_are_counted_in_elements(
    column: str, dtype: str, num_bytes: int, tmp_path: Path
) -> None:
    header = f"framework,version,device,op_name,kernel_source,{column},num_gpus,message_size,latency\n"
    row = "NCCL,2.27.3,NVIDIA L40S,all_reduce,NCCL,{},2,1048576,0.2\n"
    path = written(tmp_path, header + row.format(dtype) + row.format("fp3"))
    (measured,) = import_tables("aiconfigurator", [path])
    assert measured.tables[0].numbers("num_bytes").tolist() == [num_bytes * 2**20]
    assert measured.notes == ("messages of fp3 are left out",)


def test_splitwise_gives_two_phases_and_marks_the_capped_host(tmp_path: Path) -> None:
    rows = "llama2-70b,a100-80gb,512,1,128,200,55,2\nllama2-70b,h100-80gb-pcap,512,1,128,100,40,2\n"
    a100, capped = import_tables("splitwise", [written(tmp_path, SPLITWISE + rows)])
    assert (a100.gpu, a100.provenance.host) == ("A100-SXM-80GB", "")
    assert (capped.gpu, capped.provenance.host) == ("H100-SXM-80GB", "power-capped")
    (table,) = a100.tables
    assert table.text("phase") == ["prompt", "token"]
    assert table.seconds.tolist() == pytest.approx([0.2, 0.055])
    assert table.text("model") == ["meta-llama/Llama-2-70b-hf"] * 2


META = """gpu: NVIDIA GeForce RTX 4090
model: 'meta-llama/Llama-3.1-8B'
variant: bf16
vllm_version: 0.19.0
engine_effective:
  model: /tmp/one_layer
"""
BATCHES = "prefill_chunk,kv_prefill,n_decode,kv_decode,time_us\n"
OPERATORS = "layer,tokens,time_us\n"


def profiled(
    tmp_path: Path, table: str, *, meta: str | None = META, folder: str = "tp2", name: str = "attention.csv"
) -> Path:
    """Write a table where LLMServingSim's profiler would, and return its path."""
    if meta is not None:
        (tmp_path / "meta.yaml").write_text(meta)
    (tmp_path / folder).mkdir()
    return written(tmp_path / folder, table, name)


def test_folders_of_llmservingsim_s_profiler_say_what_its_tables_do_not(tmp_path: Path) -> None:
    rows = "512,2048,0,0,184.3\n0,0,4,1024,30\n0,0,1,16,8\n"
    mixed = (
        "".join(f"512,2048,4,1024,{time}\n" for time in (150.0, 321.45, 700.0)) + "512,2048,1,16,999\n512,0,4,1024,9\n"
    )
    (measured,) = import_tables("llmservingsim", [profiled(tmp_path, BATCHES + mixed + rows)])
    by = measured.provenance
    assert (measured.gpu, by.tool, by.engine, by.engine_version) == (
        "RTX-4090",
        "casys-kaist/LLMServingSim",
        "vLLM",
        "0.19.0",
    )
    heads = {"query_heads": [16], "kv_heads": [4], "head_dim": [128]}
    decode, both, prefill = ({name: column.tolist() for name, column in one.columns.items()} for one in measured.tables)
    assert prefill == {
        "batch": [1],
        "tokens": [512],
        "past_tokens": [2048],
        **heads,
        "seconds": [pytest.approx(184.3e-6)],
    }
    assert decode == {
        "batch": [4, 1], "context_tokens": [1024, 16], "seconds": [pytest.approx(30e-6), pytest.approx(8e-6)],
        **{name: 2 * column for name, column in heads.items()},
    }  # fmt: skip
    assert both == {
        "tokens": [512] * 5, "past_tokens": [2048] * 4 + [0], "batch": [4, 4, 4, 1, 4],
        "context_tokens": [1024, 1024, 1024, 16, 1024], **{name: 5 * column for name, column in heads.items()},
        "seconds": pytest.approx([150e-6, 321.45e-6, 700e-6, 999e-6, 9e-6]),
    }  # fmt: skip
    assert [table.op for table in measured.tables] == [
        MeasuredOp.DECODE_ATTENTION,
        MeasuredOp.MIXED_ATTENTION,
        MeasuredOp.PREFILL_ATTENTION,
    ]
    assert {table.kernel for table in measured.tables} == {"vllm_attention"}
    assert measured.notes == (
        "chunks beside decoding requests of meta-llama/Meta-Llama-3.1-8B TP 2 take 1.50 times the sum of the two alone "
        "in the serving range (0.86 to 2.91 in 8 of 10; 3 rows)",
    )


def test_operators_of_llmservingsim_s_profiler_make_a_layer(tmp_path: Path) -> None:
    names = ("embedding", "layernorm", "qkv_proj", "rotary_emb", "o_proj", "gate_up_proj", "act_fn", "down_proj")
    table = OPERATORS + "".join(f"{name},64,{10 + place}\n" for place, name in enumerate(names))
    (measured,) = import_tables("llmservingsim", [profiled(tmp_path, table, name="dense.csv")])
    (layer,) = measured.tables
    params = dict(zip(layer.text("op"), layer.numbers("params"), strict=True))
    assert params == {
        "layernorm": 0, "qkv_proj": 4096 * 6144 / 2, "rotary_emb": 0, "o_proj": 4096 * 4096 / 2,
        "gate_up_proj": 4096 * 14336, "act_fn": 0, "down_proj": 4096 * 14336 / 2,
    }  # fmt: skip
    assert layer.seconds.tolist() == pytest.approx([1e-6 * time for time in (22, 12, 13, 14, 15, 16, 17)])
    assert measured.notes == ("experts, embeddings, LM head and the attention among the layers are left out",)


@pytest.mark.parametrize(
    ("meta", "folder", "row", "said"),
    [
        (None, "tp2", "0,0,1,16,8", "the table itself says neither GPU nor model"),
        (
            None,
            "bf16",
            "0,0,1,16,8",
            "is in the folder bf16, expected tp1, tp2, ...: the table does not say its TP degree",
        ),
        (
            META.replace("RTX 4090", "H100"),
            "tp2",
            "0,0,1,16,8",
            "meta.yaml: gpu: is 'NVIDIA GeForce H100', no GPU of the ",
        ),
        (
            META.replace("Llama-3.1", "Llama-9"),
            "tp2",
            "0,0,1,16,8",
            "model: is 'meta-llama/Llama-9-8B', not a model of the",
        ),
        (META.replace("meta-llama/Llama-3.1-8B", "DeepSeek-V3"), "tp2", "0,0,1,16,8", "whose attention is latent"),
        (META, "tp3", "0,0,1,16,8", "whose 32 heads TP 3 does not divide"),
        (
            META.replace("bf16", "fp8"),
            "tp2",
            "0,0,1,16,8",
            "variant: is 'fp8', expected bf16 or fp16: weights and KV of 16",
        ),
        (META, "tp2", "0,0,0,16,8", "row 2: n_decode: is 0, and so is prefill_chunk: nothing is attended to"),
        (META, "tp2", "0,0,2,0,8", "row 2: kv_decode: is 0, must be >= 1"),
        (META, "tp2", "0,0,-2,9,8", "row 2: n_decode: is -2, must be >= 0"),
    ],
)
def test_tables_of_llmservingsim_s_profiler_in_the_wrong_place_are_refused(
    tmp_path: Path, meta: str | None, folder: str, row: str, said: str
) -> None:
    assert said in message("llmservingsim", profiled(tmp_path, f"{BATCHES}{row}\n", meta=meta, folder=folder))


def test_a_right_unit_passes_and_a_wrong_one_does_not(tmp_path: Path) -> None:
    assert len(import_tables("aiconfigurator", [written(tmp_path, gemm_rows())])) == 1
    for factor, share in ((1e3, "0.0005 of"), (1e-3, "500 times")):
        path = written(tmp_path, gemm_rows(factor))
        assert message("aiconfigurator", path) == (
            f"{path}: row 2: latency_ms: gemm: the 25 largest rows imply {share} the peaks of A100-SXM-80GB, "
            "expected 0.02 to 20: check the unit"
        )


def test_a_gpu_that_could_be_several_is_refused_with_them(tmp_path: Path) -> None:
    path = written(tmp_path, f"{GEMM}NVIDIA H100,bfloat16,1,32,32,0.002\n")
    assert message("aiconfigurator", path).endswith(
        "device: is 'NVIDIA H100', which could be H100-PCIe-80GB or H100-SXM-80GB or H100-NVL-94GB"
    )


def test_every_wrong_value_is_named_with_file_row_and_column(tmp_path: Path) -> None:
    text = (
        GEMM
        + "NVIDIA L40S,bfloat16,1,32,x,0.002\nNVIDIA L41S,bfloat16,1,32,32,0.002\nNVIDIA L40S,bfloat16,0.5,32,32,-1\n"
    )
    path = written(tmp_path, text)
    assert message("aiconfigurator", path).split("\n") == [
        f"{path}: row 2: k: is 'x', expected a number",
        f"{path}: row 3: device: is 'NVIDIA L41S', no GPU of the catalogue",
        f"{path}: row 4: latency_ms: is -1, must be > 0",
        f"{path}: row 4: m: is 0.5, must be >= 1",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "is empty"),
        (GEMM, "has a header and no rows"),
        (GEMM + "NVIDIA L40S,bfloat16,1\n", "row 2: has 3 values, the header 6"),
        ("a,a\n1,2\n", "header: has column a more than once"),
        (
            "device,m,n,k,latency_ms\nNVIDIA L40S,1,1,1,1\n",
            "header: has no column gemm_dtype (nearest: a table of GEMMs); found: device, m, n, k, latency_ms",
        ),
        (GEMM + "NVIDIA L40S,bfloat16,1,32,32,inf\n", "row 2: latency_ms: is inf, must be finite"),
        (
            GEMM + "NVIDIA L40S,bfloat16,1,32,32,1e9\n",
            "row 2: latency_ms: is 1e+06 s, must be <= 600 s: check the unit",
        ),
    ],
)
def test_tables_of_the_wrong_shape_are_refused(tmp_path: Path, text: str, expected: str) -> None:
    path = written(tmp_path, text)
    assert message("aiconfigurator", path) == f"{path}: {expected}"


def test_rows_of_another_length_do_not_hide_other_problems(tmp_path: Path) -> None:
    text = GEMM + "NVIDIA L40S,bfloat16,1\nNVIDIA L40S,bfloat16,1,32,x,0.002\nNVIDIA L40S,bfloat16,1,32,32,1,1\n"
    path = written(tmp_path, text)
    assert message("aiconfigurator", path).split("\n") == [
        f"{path}: row 2: has 3 values, the header 6",
        f"{path}: row 4: has 7 values, the header 6",
        f"{path}: row 3: k: is 'x', expected a number",
    ]


def test_a_header_is_refused_before_the_rows_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few hundred kilobytes may unpack to hundreds of megabytes."""
    path = written(tmp_path, "a,b\n" * 1_000_000, "bomb.csv.gz")
    unpacked = 0
    read_line = gzip.GzipFile.readline

    def counted(self: gzip.GzipFile, size: int | None = -1) -> bytes:
        nonlocal unpacked
        line: bytes = read_line(self, size)
        unpacked += len(line)
        return line

    monkeypatch.setattr(gzip.GzipFile, "readline", counted)
    assert message("aiconfigurator", path).startswith(f"{path}: header: has no column ")
    assert unpacked == len("a,b\n")


def test_rows_and_the_length_of_lines_are_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "MAX_ROWS", 3)
    row = "NVIDIA L40S,bfloat16,1,32,32,0.002\n"
    path = written(tmp_path, GEMM + 4 * row)
    assert message("aiconfigurator", path) == f"{path}: has more than 3 rows: split it"
    path = written(tmp_path, f"{GEMM}{'x' * 2**21}")
    assert message("aiconfigurator", path) == f"{path}:2: has a line of more than 1 MiB"
    path = written(tmp_path, GEMM + 200 * "x\n")
    assert message("aiconfigurator", path).endswith("... and more problems; only the first 100 are reported")


def test_truncated_and_damaged_files(tmp_path: Path) -> None:
    raw = gzip.compress(gemm_rows().encode(), mtime=0)
    cut = tmp_path / "cut.csv.gz"
    cut.write_bytes(raw[: len(raw) // 2])
    size = len(raw) // 2
    assert message("aiconfigurator", cut) == (
        f"{cut}: is truncated: its gzip stream ends after {size} bytes without an end mark"
    )
    damaged = tmp_path / "damaged.csv.gz"
    damaged.write_bytes(raw[:20] + bytes(40) + raw[60:])
    assert message("aiconfigurator", damaged).startswith(f"{damaged}: is damaged: ")
    assert message("vidur", tmp_path / "none.csv") == f"{tmp_path / 'none.csv'}: no such file"


def test_one_bad_file_spoils_all(tmp_path: Path) -> None:
    good, bad = written(tmp_path, gemm_rows(), "good.csv"), written(tmp_path, "x\n1\n", "bad.csv")
    assert message("aiconfigurator", good, bad).startswith(f"{bad}: header: ")


def test_rows_may_come_in_any_order(tmp_path: Path) -> None:
    lines = gemm_rows().splitlines(keepends=True)
    forward = import_tables("aiconfigurator", [written(tmp_path, "".join(lines), "f.csv")])
    backward = import_tables("aiconfigurator", [written(tmp_path, lines[0] + "".join(lines[:0:-1]), "b.csv")])
    assert np.array_equal(np.sort(forward[0].tables[0].seconds), np.sort(backward[0].tables[0].seconds))
