"""Published rows as settings and candidates of the planner. Assumptions that a source leaves open are made here, once.

Nothing in this file depends on a row's measured value.
"""

import csv
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from calibration_fit import Measured

from thinwire.cluster.cluster import Cluster, Level
from thinwire.cluster.hardware import device_preset
from thinwire.model.presets import preset
from thinwire.model.spec import ModelSpec
from thinwire.predict.candidate import Candidate, CandidateSync, Framework, Setting
from thinwire.predict.outer_cost import fragment_bytes

FOLDER = Path(__file__).parent / "validation"
GBIT = 1e9 / 8
PUBLIC_VOCABULARY = 51200
"""Megatron's padded GPT-2 vocabulary, where a row gives none."""

MEGATRON_2021 = Framework(
    "Megatron-LM and Megatron-DeepSpeed, 2021-23",
    grad_wire_bytes=2.0,
    flash_attention=False,
    dropout=True,
    sequence_parallel=False,
    scattered_messages=True,
    overlap_reduce=False,
    overlap_refresh=False,
)
"""arXiv 2104.04473: scores stored, whole-gradient all-reduce after the last backward."""

DEEPSPEED_ZERO3 = Framework(
    "DeepSpeed ZeRO-3, 2021", grad_bytes=2.0, grad_wire_bytes=2.0, flash_attention=False, dropout=True
)
"""arXiv 2104.04473, table 2: without model parallelism."""

TORCHTITAN = Framework(
    "torchtitan, 2024",
    fused_elementwise=True,
    logits_bytes=14.0,
    split_logits_bytes=18.0,
    casts_on_gather=True,
    keeps_gathered_inputs=True,
)
"""FSDP2 and DTensor. Its log reports what the allocator has reserved (`max_reserved_gib` in its metrics.py).

The block of the half-precision logits is too small for an fp32 buffer of the loss, so its 2 bytes stay reserved beside 12;
beside the 16 of torch's loss parallelism (log-softmax, its gradient's two terms, their sum, or that sum and its product)
the block of the fp32 logits is used again by one of these, but one more is asked for while all are taken: 2 + 16.
"""

INTERNEVO = Framework(
    "InternEvo, 2024",
    grad_bytes=2.0,
    grad_wire_bytes=2.0,
    optimizer_bytes=16.0,
    broadcast_refresh=True,
    overlap_refresh=False,
)
"""A hybrid-precision optimizer with an fp32 copy of the gradients."""


@dataclass(frozen=True)
class Row:
    """A published row: its columns and what they mean to the planner; seconds, or bytes for memory rows."""

    columns: dict[str, str]
    measured: Measured

    def __getitem__(self, name: str) -> str:
        return self.columns[name]

    @property
    def seconds(self) -> float:
        return self.measured.seconds


def read(name: str) -> list[dict[str, str]]:
    with (FOLDER / f"{name}.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def cluster(device: str, gpus: int, *, inside: float, node: float) -> Cluster:
    """Nodes of eight; `inside` is a GPU's rate in the node, `node` that of all adapters of a node, bytes per second."""
    size = 8 if gpus % 8 == 0 else gpus
    levels = (
        Level(name="node", fanout=size, bytes_per_s=inside, latency_s=5e-6, origin="given"),
        Level(name="cluster", fanout=gpus // size, bytes_per_s=node, latency_s=10e-6, origin="given"),
    )
    return Cluster(device=device_preset(device), levels=levels)


def gpt(row: dict[str, str]) -> ModelSpec:
    hidden, heads = int(row["hidden"]), int(row["heads"])
    return ModelSpec(
        family="gpt2", vocab_size=int(row["vocab"] or PUBLIC_VOCABULARY), hidden=hidden, layers=int(row["layers"]),
        heads=heads, kv_heads=heads, head_size=hidden // heads, ffn=4 * hidden, max_tokens=int(row["seq_len"]), tied=True,
        bias=True,
    )  # fmt: skip


def _megatron(row: dict[str, str], given: Cluster, framework: Framework = MEGATRON_2021) -> Row:
    recompute = "selective" if row["recompute"].startswith("selective") else "full"
    candidate = Candidate(
        tensor=int(row["tp"]),
        pipeline=int(row["pp"]),
        chunks=int(row["vpp"] or 1),
        micro_batch=int(row["micro_batch"]),
        recompute=recompute,  # type: ignore[arg-type]
        depths=(1, 1, 1) if row["shard"] == "zero3" else (-1, -1, -1),
    )
    setting = Setting(gpt(row), given, int(row["global_batch_seqs"]), int(row["seq_len"]), framework)
    return Row(row, Measured(setting, candidate, float(row["derived_step_s"])))


def vtrain() -> list[Row]:
    """Links as the data set's own configuration files state them: 150 GB/s inside, 800 Gbit/s a node."""
    return [
        _megatron(row, cluster("a100-80g", int(row["gpus"]), inside=150e9, node=800 * GBIT))
        for row in read("vtrain_multi_node_a100")
    ]


def selene(gpus: int) -> Cluster:
    """Data sheets: NVLink 3, eight HDR adapters of 200 Gbit/s."""
    return cluster("a100-80g", gpus, inside=300e9, node=1600 * GBIT)


def table1() -> list[Row]:
    return [_megatron(row, selene(int(row["gpus"]))) for row in read("megatron_2104_04473_table1")]


def table2() -> list[Row]:
    """ZeRO-3 by DeepSpeed beside Megatron; the paper gives no interleaving, so there is none here."""
    return [
        _megatron(row, selene(int(row["gpus"])), DEEPSPEED_ZERO3 if row["shard"] == "zero3" else MEGATRON_2021)
        for row in read("megatron_2104_04473_table2_zero3_vs_ptd")
    ]


def korthikanti() -> list[Row]:
    found = []
    for row in read("korthikanti_2205_05198_table5_time"):
        framework = Framework(
            "Megatron-LM, 2022", flash_attention=False, dropout=True, sequence_parallel="+ sequence" in row["recompute"],
            overlap_reduce=False, overlap_refresh=False, grad_wire_bytes=2.0,
        )  # fmt: skip
        found.append(_megatron(row, selene(int(row["gpus"])), framework))
    return found


INTERNLM_7B = ModelSpec(
    vocab_size=103168, hidden=4096, layers=32, heads=32, kv_heads=32, head_size=128, ffn=11008, max_tokens=4096
)
INTERNLM_20B = INTERNLM_7B.model_copy(update={"hidden": 5120, "layers": 60, "heads": 40, "kv_heads": 40, "ffn": 13824})


def internevo() -> list[Row]:
    """Four 100 Gbit/s adapters a node. The model's shape is not in the source."""
    found = []
    for row in read("internevo_7b_a100_scaling"):
        given = cluster("a100-80g", int(row["gpus"]), inside=300e9, node=400 * GBIT)
        everywhere = row["shard"] == "zero1 over all DP"
        candidate = Candidate(
            tensor=int(row["tp"]),
            micro_batch=int(row["micro_batch"]),
            recompute="full" if row["recompute"] == "full" else "none",
            depths=(-1, -1, 1) if everywhere else (-1, -1, 0),
        )
        setting = Setting(INTERNLM_7B, given, int(row["global_batch_seqs"]), int(row["seq_len"]), INTERNEVO)
        found.append(Row(row, Measured(setting, candidate, float(row["derived_step_s"]))))
    return found


LLAMA = {"Llama-3.1-8B": "llama-3-8b", "Llama-3.1-70B": "llama-3-70b", "Llama-3.1-405B": "llama-3.1-405b"}


def torchtitan(metric: str) -> list[Row]:
    """Rows of `peak_memory` (value in bytes) or `tokens_per_gpu_s`.

    With a pipeline a local batch is eight micro-batches, and FSDP2 keeps weights and gradients whole between them. The 8B
    model's file of settings (train_configs/llama3_8b.toml) says `selective_ac_option = 'op'`.
    """
    found = []
    for row in read("torchtitan_llama3"):
        if row["metric"] != metric:
            continue
        piped = int(row["pp"]) > 1
        candidate = Candidate(
            tensor=int(row["tp"]),
            pipeline=int(row["pp"]),
            chunks=2 if "interleaved" in row["notes"] else 1,
            context=int(row["cp"]),
            micro_batch=max(1, int(row["micro_batch"]) // 8) if piped else int(row["micro_batch"]),
            recompute="per-op" if row["recompute"] in ("selective", "selective per-op") else "full",
            recompute_every=2 if row["recompute"] == "selective layer" else 1,
            depths=(-1, -1, 1) if piped else (1, 1, 1),
        )
        eager = "eager" in row["notes"]
        framework = replace(TORCHTITAN, fused_elementwise=False) if eager else TORCHTITAN
        device = "a100-80g" if row["hardware"].startswith("A100") else "h100"
        given = cluster(device, int(row["gpus"]), inside=300e9 if device == "a100-80g" else 450e9, node=3200 * GBIT)
        spec = preset(LLAMA[row["model"]])
        setting = Setting(spec, given, int(row["global_batch_seqs"]), int(row["seq_len"]), framework)
        value = float(row["value"]) * 2**30 if metric == "peak_memory" else float(row["derived_step_s"])
        found.append(Row(row, Measured(setting, candidate, value)))
    return found


def internevo_memory() -> list[Row]:
    """Four micro-batches a rank; 2,048 tokens a sequence."""
    found = []
    for row in read("internevo_memory_a800"):
        gpus = int(row["gpus"])
        spec = INTERNLM_7B if row["model"] == "InternLM-7B" else INTERNLM_20B
        given = cluster("a100-80g", gpus, inside=200e9, node=400 * GBIT)
        candidate = Candidate(
            tensor=int(row["tp"]),
            pipeline=int(row["pp"]),
            micro_batch=1,
            recompute="full",
            depths=(1, 1, 1) if row["shard"] == "fsdp" else (-1, -1, 1),
        )
        setting = Setting(spec, given, int(row["dp"]) * 4, 2048, INTERNEVO)
        found.append(Row(row, Measured(setting, candidate, float(row["value"]) * 1e9)))
    return found


def layered_stall_s(
    sent: Sequence[int],
    *,
    layers: int,
    layer_travel_s: float,
    step_s: float,
    overlap_steps: int,
    forward_share: float = 1 / 3,
) -> float:
    """Stall of one round when every layer travels by itself, as in the simulation of arXiv 2501.18512, section 4.

    A layer of `sent` sets out when its backward ends, they share one stream, and each is needed when its own forward begins
    `overlap_steps` steps later than the next. Data parallelism is the case of all layers in every step.
    """
    forward, backward = step_s * forward_share / layers, step_s * (1 - forward_share) / layers
    stream, arrive = 0.0, {}
    for layer in sorted(sent, reverse=True):
        stream = arrive[layer] = max(stream, (layers - layer) * backward) + layer_travel_s
    start = now = layers * backward + overlap_steps * step_s
    for layer in range(layers):
        now = max(now, arrive.get(layer, 0.0)) + forward
    return now - start - layers * forward


def layered_rate(
    wanted: float, *, parameters: float, layers: int, groups: int, step_s: float, sync: CandidateSync | None
) -> float:
    """Like `rate_for_utilisation`, for layers that travel by themselves; found by halving."""
    plain = sync or CandidateSync(level=0, inner_steps=1)
    each = 2 * (groups - 1) / groups * fragment_bytes(parameters / layers, CandidateSync(0, 1, codec=plain.codec))
    fragments = [range(first, layers, plain.fragments) for first in range(plain.fragments)]  # strided over the layers

    def share(rate: float) -> float:
        stalls = [
            layered_stall_s(
                sent, layers=layers, layer_travel_s=each / rate, step_s=step_s, overlap_steps=plain.overlap_steps
            )
            for sent in fragments
        ]
        computing = plain.inner_steps * step_s
        return computing / (computing + sum(stalls))

    low, high = 1.0, 1e15
    while high / low > 1.0001:
        middle = (low * high) ** 0.5
        low, high = (low, middle) if share(middle) >= wanted else (middle, high)
    return high


def hardware_flops_per_token(spec: ModelSpec, tokens: int, *, recompute: str) -> float:
    """FLOPs really done per token: the numerator of HFU (Korthikanti et al., arXiv 2205.05198, section 5).

    Full recompute repeats each block's forward (not the head); selective repeats the attention core.
    """
    model, forward = spec.model_flops_per_token(tokens), spec.forward_flops_per_token(tokens)
    if recompute == "full":
        return model + forward - 2.0 * spec.vocab_size * spec.hidden
    if recompute == "selective":
        return model + forward - 2.0 * spec.matmul_parameters
    return model
