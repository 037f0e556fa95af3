"""The models, each in our form and in llama.cpp's, under models/; made or fetched if they are not there."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from bench_common import PROGRAM, ROOT, checkpoint

from .programs import PEERS_PYTHON

MODELS = ["qwen3-1.7b-8bit", "qwen3-1.7b-4bit", "smollm2-135m"]
HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Pair:
    """One model for two programs."""

    checkpoint: Path | None  # MLX's directory, for us and for mlx-lm; None where ./mlx-pipe is needed to make it
    gguf: Path

    def weight_bytes(self) -> int:
        """Bytes of weights that one decoding step of ours reads: all of them, for the embedding is also the head."""
        assert self.checkpoint, "asked of a model that is not there"
        config = json.loads((self.checkpoint / "config.json").read_text())
        assert config["tie_word_embeddings"], "an embedding that is no head is not read as a whole"
        return sum(tensor_bytes(file) for file in self.checkpoint.glob("*.safetensors"))


def tensor_bytes(file: Path) -> int:
    """Size of a safetensors file without its header and the header's length."""
    with open(file, "rb") as opened:
        header_bytes = int.from_bytes(opened.read(8), "little")
    return file.stat().st_size - 8 - header_bytes


def prepare(model: str) -> Pair:
    """Both forms of a model."""
    return smollm2() if model == "smollm2-135m" else random_qwen3(int(model[-4]))


def random_qwen3(bits: int) -> Pair:
    """Random weights of the shape of Qwen3-1.7B."""
    directory = checkpoint("qwen3-1.7b", bits, python=PEERS_PYTHON)
    gguf = ROOT / f"models/random-qwen3-1.7b-q{bits}_0.gguf"
    if not gguf.exists():
        subprocess.run([PEERS_PYTHON, HERE / "write_gguf.py", directory, f"Q{bits}_0", gguf], check=True)
    return Pair(directory, gguf)


def smollm2() -> Pair:
    """SmolLM2-135M-Instruct, the published weights: llama.cpp takes the very file that we import."""
    gguf = ROOT / "models/SmolLM2-135M-Instruct.gguf"
    subprocess.run([ROOT / "scripts/fetch-demo-model", "--gguf", gguf], check=True, stdout=sys.stderr)
    if not PROGRAM.exists():
        print("bench: no ./mlx-pipe to import SmolLM2 with, so it is measured for llama.cpp alone", file=sys.stderr)
        return Pair(None, gguf)
    subprocess.run([ROOT / "scripts/fetch-demo-model"], check=True, stdout=sys.stderr)
    return Pair(ROOT / "models/SmolLM2-135M-Instruct", gguf)
