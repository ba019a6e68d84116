"""Models and option sets that are not carried: llama.cpp's tiny models of random sizes, random flags."""

from __future__ import annotations

import random
import subprocess
import sys
from typing import TYPE_CHECKING

from support import ground_truth

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

# What a model needs beyond the common keys before llama.cpp makes it.
EXTRA = {
    **dict.fromkeys(
        ("bert", "nomic-bert", "jina-bert-v2", "jina-bert-v3"), "raw=1 tokenizer.ggml.token_type_count=2"
    ),
    "nomic-bert-moe": "raw=1 tokenizer.ggml.token_type_count=2 moe_every_n_layers=2",
    **dict.fromkeys(("modern-bert", "neo-bert", "eurobert", "wavtokenizer-dec"), "raw=1"),
    "gemma4": "raw=1 attention.sliding_window_pattern=1,1,0,1,1,0,1,1,0,1,1,0",
    "rwkv6qwen2": "token_shift_count=1 without=time_mix_first",
    "graniteswitch": "raw=1 adapters.count=2 adapters.lora_rank=8"
    " adapters.token_ids_activate=3,4 adapters.token_ids_substitute=5,6",
    "eagle3": "raw=1 own=1 target_layers=0,1,2 target_hidden_size=256",
    "dflash": "raw=1 target_layers=0,1,2 attention.sliding_window_pattern=1,1,0,1,1,0",
    "rwkv7": "attention.decay_lora_rank=64 attention.iclr_lora_rank=64"
    " attention.value_residual_mix_lora_rank=32 attention.gate_lora_rank=128",
}
# Heads per layer in a list, or tied to other sizes: only their width changes.
FIXED_HEADS = {
    *("plamo2", "jamba", "nemotron_h", "nemotron_h_moe", "granitehybrid", "lfm2", "lfm2moe", "kimi-linear"),
    *("bailingmoe3", "kimi-k3", "glm5-next", "qwen3next", "qwen35", "qwen35moe", "gemma3n", "gemma4"),
    *("deepseek4", "hrm_text", "rwkv6", "rwkv6qwen2", "rwkv7"),
}
CACHE_TYPES = ["f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1"]


def model_line(architecture: str, kind: str, path: Path, rng: random.Random) -> str:
    """A line for ``tiny_models``: the architecture with random sizes."""
    layers = {"gemma3n": 22, "gemma4": 12, "deepseek4": 4, "hrm_text": 6, "eagle3": 1, "dflash": 6}.get(
        architecture, rng.choice([3, 4, 5, 6, 8, 9, 12])
    )
    settings = [EXTRA.get(architecture, "")]
    if architecture not in FIXED_HEADS:
        heads_kv = rng.choice([1, 2, 2, 4, 8])
        heads = heads_kv * rng.choice([1, 1, 2, 3, 4, 7])
        head = rng.choice([32, 64, 64, 80, 96, 128, 128, 256]) if heads_kv == 1 else 64
        settings.append(f"embedding_length={heads * head} attention.head_count={heads}")
        settings.append(f"attention.head_count_kv={heads_kv} ssm.time_step_rank={heads}")
    settings.append(f"feed_forward_length={rng.choice([256, 384, 512, 1024, 1536, 2816])}")
    settings.append(f"context_length={rng.choice([256, 2048, 8192, 32768])}")
    settings.append(f"attention.sliding_window={rng.choice([32, 128, 512, 1024, 4096])}")
    if architecture == "chameleon":
        settings.append(f"swin_norm={rng.choice([0, 1])}")
    if architecture != "qwen3tts":
        settings.append(f"vocabulary={rng.choice([128, 1000, 5003, 32000])}")
    if kind == "moe":
        experts = rng.choice([2, 4, 8, 16, 32])
        used = min(experts, rng.choice([1, 2, 3, 4, 6, 8]))
        settings.append(f"expert_count={experts} expert_used_count={used}")
        settings.append(f"expert_feed_forward_length={rng.choice([64, 128, 256, 768])}")
        settings.append(f"leading_dense_block_count={rng.choice([0, 1, 1, 2])}")
        settings.append(f"expert_shared_count={rng.choice([1, 1, 2])}")
        settings.append(f"expert_weights_norm={rng.choice([0, 1])}")
    return " ".join([architecture, kind, str(path), str(layers), *settings])


def option_set(layers: int, rng: random.Random) -> tuple[int, str]:
    """How many devices, and llama-server's flags."""
    devices = rng.choice([0, 1, 1, 1, 1, 2, 2, 3, 4])
    flags = [f"-c {rng.choice([512, 1000, 2048, 4096, 5000, 8192, 12288, 16384, 32768, 65536])}"]
    slots = rng.choice([1, 1, 1, 1, 2, 3, 4, 5, 8])
    flags += [f"-np {slots}"] * (slots > 1)
    flags += ["-kvu"] * rng.choice([True, False, slots > 1, False])
    if rng.choice([True, False, False]):
        micro_batch = rng.choice([32, 64, 128, 200, 256, 512, 1024, 2048])
        flags.append(f"-b {rng.choice([micro_batch, 2 * micro_batch, 2048])} -ub {micro_batch}")
    flash = rng.choice(["auto", "auto", "auto", "on", "on", "off"])
    flags.append(f"-fa {flash}")
    if rng.choice([True, False]):
        key = rng.choice(CACHE_TYPES)
        value = rng.choice([key, key, rng.choice(CACHE_TYPES)])
        value = value if flash != "off" or value in CACHE_TYPES[:3] else "f16"
        flags.append(f"-ctk {key} -ctv {value}")
    if devices:
        flags.append(f"-ngl {rng.choice([999, 999, 999, rng.randint(0, layers + 1)])}")
        if devices > 1:
            flags.append(
                "-ts " + ",".join(rng.choice(["1", "1", "2", "3", "0.5", "0.7"]) for _ in range(devices))
            )
        flags += rng.choice([[], [], [], [], [], [], ["-cmoe"], [f"-ncmoe {rng.randint(1, layers)}"]])
        flags += rng.choice([[], [], [], [], [], [], [], ["-nkvo"]])
    flags += rng.choice([[], [], [], [], [], [], [], ["--swa-full"]])
    return devices, " ".join(flags)


def make_models(
    tool: Path, folder: Path, count: int, seed: int, only: Sequence[str]
) -> list[tuple[Path, int]]:
    """Random tiny models of ``count`` sizes per architecture, with their numbers of layers."""
    listed = subprocess.run([str(tool), "list"], stdout=subprocess.PIPE, text=True, check=True).stdout
    lines = []
    for architecture, mandatory, possible in (line.split() for line in listed.splitlines()):
        kinds = ["moe"] if mandatory == "1" else ["dense", "moe"] if possible == "1" else ["dense"]
        for kind in kinds if not only or architecture in only else []:
            for number in range(count):
                rng = random.Random(f"{seed} {architecture} {kind} {number}")
                path = folder / f"{architecture}-{kind}-{number}.gguf"
                lines.append(model_line(architecture, kind, path, rng))
    made = subprocess.run(  # noqa: PLW1510
        [str(tool)],
        input="\n".join(lines) + "\n",
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    results = [
        line.split(maxsplit=5) for line in made.stdout.splitlines() if line[:2].strip("- 0123456789") == ""
    ]
    models = [
        (folder / result[3].rsplit("/", 1)[-1], int(result[4])) for result in results if result[0] == "0"
    ]
    print(f"{len(models)} of {len(lines)} models could be made", file=sys.stderr)
    return models


def cases(path: Path, layers: int, count: int, seed: int) -> list[ground_truth.Case]:
    """Random cases of a model, not answered yet."""
    rng = random.Random(f"{seed} {path.stem}")
    sets = [option_set(layers, rng) for _ in range(count)]
    return [ground_truth.Case(path.stem, flags, "generic", devices, flags, ()) for devices, flags in sets]
