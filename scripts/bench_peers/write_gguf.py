"""Writes a random GGUF of the shape of an MLX checkpoint, for llama.cpp: same tensors, same bits.

    python write_gguf.py CHECKPOINT_DIR Q8_0|Q4_0 OUT.gguf

Takes the shape from config.json (qwen3 only) and no weight: the numbers are random and of the size that make-checkpoint
gives them, so that activations stay finite. Both quantisations cost what MLX's cost in groups of 64: 8.5 and 4.5 bits a
weight. Every matrix has the same type, the embedding as well: llama.cpp's own files in Q4_0 spend 6.6 bits on that one,
which would be more to read for it than for us. There is no tokenizer in it: prompts are token ids.
"""

import json
import math
import sys
from pathlib import Path

import gguf
import numpy as np

BLOCK = 32  # weights in a block of Q8_0 or Q4_0, which is one f16 scale and then the codes


def random_blocks(draw: np.random.Generator, kind: str, rows: int, columns: int, deviation: float) -> np.ndarray:
    """The bytes of a matrix [rows, columns] whose weights are uniform and of that standard deviation."""
    codes, highest = {"Q8_0": (BLOCK, 127), "Q4_0": (BLOCK // 2, 7.5)}[kind]
    blocks = draw.integers(0, 256, (rows * columns // BLOCK, 2 + codes), np.uint8)
    blocks[:, :2] = np.array([math.sqrt(3) * deviation / highest], np.float16).view(np.uint8)
    return blocks.reshape(rows, -1)


def add_config(writer: gguf.GGUFWriter, config: dict) -> None:
    """What llama.cpp wants to know of a Qwen3."""
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")


def add_tensors(writer: gguf.GGUFWriter, config: dict, kind: str) -> None:
    """Embedding, layers, last norm; the head is the embedding, as llama.cpp has it without an output.weight."""
    assert config["model_type"] == "qwen3" and config["tie_word_embeddings"], "only a tied Qwen3 is known here"
    draw = np.random.Generator(np.random.SFC64(0))
    hidden, mlp, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    query, key = config["num_attention_heads"] * head, config["num_key_value_heads"] * head

    def matrix(name: str, rows: int, columns: int, deviation: float) -> None:
        data = random_blocks(draw, kind, rows, columns, deviation)
        writer.add_tensor(f"{name}.weight", data, raw_dtype=gguf.GGMLQuantizationType[kind])

    def norm(name: str, size: int) -> None:
        writer.add_tensor(f"{name}.weight", np.ones(size, np.float32))

    matrix("token_embd", config["vocab_size"], hidden, 0.02)
    for number in range(config["num_hidden_layers"]):
        layer = f"blk.{number}"
        norm(f"{layer}.attn_norm", hidden)
        matrix(f"{layer}.attn_q", query, hidden, 1 / math.sqrt(hidden))
        matrix(f"{layer}.attn_k", key, hidden, 1 / math.sqrt(hidden))
        matrix(f"{layer}.attn_v", key, hidden, 1 / math.sqrt(hidden))
        norm(f"{layer}.attn_q_norm", head)
        norm(f"{layer}.attn_k_norm", head)
        matrix(f"{layer}.attn_output", hidden, query, 1 / math.sqrt(query))
        norm(f"{layer}.ffn_norm", hidden)
        matrix(f"{layer}.ffn_gate", mlp, hidden, 1 / math.sqrt(hidden))
        matrix(f"{layer}.ffn_up", mlp, hidden, 1 / math.sqrt(hidden))
        matrix(f"{layer}.ffn_down", hidden, mlp, 1 / math.sqrt(mlp))
    norm("output_norm", hidden)


def main() -> None:
    checkpoint, kind, out = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    config = json.loads((checkpoint / "config.json").read_text())
    unfinished = out.with_suffix(".part")
    writer = gguf.GGUFWriter(unfinished, config["model_type"])
    add_config(writer, config)
    add_tensors(writer, config, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    unfinished.rename(out)  # an interrupted run leaves nothing that looks like a model


if __name__ == "__main__":
    main()
