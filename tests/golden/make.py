#!/usr/bin/env python3
"""Makes the golden cases beside this file: tiny MLX checkpoints and what mlx-lm answers with them.

Each case is a directory that mlx-lm itself wrote (`config.json`, `*.safetensors`) from seeded random weights, plus

    golden.json         prompts as token ids, the greedy continuation of each, how clear-cut it was
    golden.safetensors  `logits`, f32 [prompt, step, vocabulary], at the steps that golden.json names

computed by mlx-lm's own model classes in f32 on the CPU. Weights come from integers of a fixed generator, so they are
the same on every machine; sums depend on the machine's matrix product in the last bits.

    python3 -m venv .venv && .venv/bin/pip install -r tests/golden/requirements.txt
    .venv/bin/python tests/golden/make.py            # make all cases again, say what changed
    .venv/bin/python tests/golden/make.py --check    # only read them: does mlx-lm still answer the same?
"""

import argparse
import importlib
import json
import math
import shutil
import sys
import tempfile
import zlib
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from unittest import mock

import mlx.core as mx

mx.set_default_device(mx.cpu)  # before mlx_lm is imported: its generation stream is bound to the device of that moment

import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm import utils
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache

HERE = Path(__file__).resolve().parent
PROMPT_LENGTHS = [1, 2, 7, 33, 70, 250]  # the last one grows past 256, the block in which mlx-lm's KV cache grows
NEW_TOKENS = 24
LOGIT_STEPS = [0, 1, 8, 23]  # step k is the position whose logits choose new token k; step 0 ends the prompt
MIN_GAP = 0.05  # best minus second-best logit, as a share of the logits' root mean square
MIN_DISTINCT = 12  # different tokens in a continuation: a model that repeats itself proves little
MAX_LOGIT_ERROR = 1e-5  # --check: ||now - golden|| / ||golden||


@dataclass(frozen=True)
class Case:
    """One checkpoint. `bits` None: not quantised. `overrides`: module path -> parameters, or False for unquantised."""

    name: str
    seed: int
    config: dict
    dtype: str = "bfloat16"
    bits: int | None = None
    group_size: int = 64
    overrides: dict = field(default_factory=dict)
    unlisted: tuple = ()  # left unquantised without a word in config.json, as mlx-lm's converter does
    first_file: int | None = None  # tensors in the first of two files
    index: bool = True  # mlx-lm writes an index for a single file, too; a Hugging Face original has none
    stops: bool = False  # give it end-of-sequence ids, one of which cuts an answer short


# ---- the cases ----------------------------------------------------------------------------------


def config(model_type: str, layers: int, hidden: int, mlp: int, heads: tuple, **more) -> dict:
    """The keys that published configurations have; `heads` is (query heads, key/value heads)."""
    classes = {"qwen3": "Qwen3ForCausalLM", "qwen2": "Qwen2ForCausalLM", "llama": "LlamaForCausalLM"}
    base = {
        "architectures": [classes[model_type]],
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "max_position_embeddings": 1024,
        "model_type": model_type,
        "num_attention_heads": heads[0],
        "num_hidden_layers": layers,
        "num_key_value_heads": heads[1],
        "rms_norm_eps": 1e-5 if model_type == "llama" else 1e-6,
        "rope_scaling": None,
        "rope_theta": 10000.0 if model_type == "llama" else 1000000,
        "tie_word_embeddings": True,
        "vocab_size": 256,
    }
    merged = {**base, **more}
    return {key: value for key, value in merged.items() if value is not ...}  # `...` leaves a key out


def every_width() -> dict:
    """A layer of each odd width; within a layer the groups take turns, so that each width meets each group."""
    widths, groups, overrides = [2, 3, 5, 6, 4], [32, 64, 128], {}
    for layer, bits in enumerate(widths):
        names = ["self_attn." + p for p in ("q_proj", "k_proj", "v_proj", "o_proj")]
        names += ["mlp." + p for p in ("gate_proj", "up_proj", "down_proj")]
        for turn, name in enumerate(names):
            group = groups[(layer + turn) % 3]
            overrides[f"model.layers.{layer}.{name}"] = {"group_size": group, "bits": bits}
    overrides["model.embed_tokens"] = {"group_size": 64, "bits": 5}
    overrides["lm_head"] = {"group_size": 32, "bits": 3}
    return overrides


LLAMA3_SCALING = {  # an original length small enough that short prompts meet all three branches
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 128,
    "rope_type": "llama3",
}

CASES = [
    # 128 query columns from 64 hidden ones, as in the published Qwen3 models where these differ.
    Case("qwen3-tied-8bit", 1, config("qwen3", 6, 64, 128, (4, 2), head_dim=32), bits=8, stops=True),
    # rope_theta under rope_parameters is how transformers 5 writes it.
    Case(
        "qwen3-untied-4bit",
        2,
        config(
            "qwen3", 5, 96, 160, (6, 2), head_dim=16, tie_word_embeddings=False, rope_theta=..., rope_scaling=...,
            rope_parameters={"rope_theta": 1000000, "rope_type": "default"},
        ),
        bits=4,
        group_size=32,
    ),
    Case(
        "qwen3-mixed",
        3,
        config("qwen3", 7, 128, 128, (4, 4), head_dim=16),
        bits=4,
        overrides={
            "model.embed_tokens": {"group_size": 64, "bits": 6},
            "model.layers.1.mlp.gate_proj": {"group_size": 128, "bits": 4},
            "model.layers.3.mlp.down_proj": {"group_size": 64, "bits": 8},
            "model.layers.5.self_attn.o_proj": {"group_size": 32, "bits": 8},
            "model.layers.4.self_attn.q_proj": False,
        },
        unlisted=("model.layers.2.self_attn.v_proj",),
    ),
    Case(
        "qwen3-every-width",
        4,
        config("qwen3", 5, 128, 128, (4, 2), head_dim=32, tie_word_embeddings=False),
        bits=2,
        group_size=128,
        overrides=every_width(),
    ),
    Case(
        "llama-tied-bf16-llama3-rope",
        5,
        config("llama", 7, 64, 112, (2, 2), head_dim=32, rope_scaling=LLAMA3_SCALING),
        index=False,
    ),
    Case(
        "llama-untied-4bit-two-files",
        6,
        config("llama", 6, 64, 128, (4, 2), tie_word_embeddings=False, rope_scaling={"factor": 4.0, "type": "linear"}),
        dtype="float16",
        bits=4,
        first_file=70,  # inside layer 2: a layer may lie in two files
    ),
    Case(
        "llama-biases-4bit",
        7,
        config("llama", 5, 64, 96, (4, 1), attention_bias=True, mlp_bias=True),
        bits=4,
        group_size=32,
    ),
    Case(
        "llama-untied-f16",
        8,
        config("llama", 5, 48, 80, (3, 1), tie_word_embeddings=False),
        dtype="float16",
        index=False,
    ),
    Case("qwen2-tied-8bit", 9, config("qwen2", 6, 96, 160, (6, 2)), bits=8, group_size=32),
    Case(
        "qwen2-untied-f32",
        10,
        config("qwen2", 5, 48, 64, (2, 2), tie_word_embeddings=False),
        dtype="float32",
        index=False,
    ),
]


# ---- a checkpoint -------------------------------------------------------------------------------


def random_weight(seed: int, name: str, shape: tuple) -> mx.array:
    """Uniform, from integers alone. Projections are large, so that attention is no plain average and every layer
    changes the outcome; embeddings are small, so that a tied head does not merely repeat the last token."""
    draw = np.random.Generator(np.random.PCG64([seed, zlib.crc32(name.encode())]))
    unit = draw.integers(-(2**20), 2**20, shape, endpoint=True).astype(np.float32) / np.float32(2**20)
    if name.endswith("norm.weight"):
        return mx.array(1 + unit / 4)
    if name.endswith(".bias"):
        return mx.array(unit / 2)
    deviation = 0.3 if "embed_tokens" in name else 1.5 / math.sqrt(shape[1])
    return mx.array(unit * np.float32(deviation * math.sqrt(3)))


def write_checkpoint(case: Case, out: Path) -> None:
    """Makes the model as mlx-lm has it, converts it as `mlx_lm.convert` does, writes it with mlx-lm's own functions."""
    module = importlib.import_module(f"mlx_lm.models.{case.config['model_type']}")
    model = module.Model(module.ModelArgs.from_dict(case.config))
    names = [(name, array.shape) for name, array in tree_flatten(model.parameters())]
    model.update(tree_unflatten([(name, random_weight(case.seed, name, shape)) for name, shape in names]))
    model.set_dtype(getattr(mx, case.dtype))
    written = {**case.config, "torch_dtype": case.dtype}
    if case.bits:

        def choose(path, _):
            return path not in case.unlisted and case.overrides.get(path, True)

        model, written = utils.quantize_model(model, written, case.group_size, case.bits, quant_predicate=choose)
        written["quantization"].update({path: False for path, how in case.overrides.items() if how is False})

    def two_files(weights):
        items = list(weights.items())
        return [dict(items[: case.first_file]), dict(items[case.first_file :])]

    with mock.patch.object(utils, "make_shards", two_files if case.first_file else utils.make_shards):
        utils.save_model(out, model)
    if not case.index:
        (out / "model.safetensors.index.json").unlink()
    utils.save_config(written, out / "config.json")


# ---- its answers --------------------------------------------------------------------------------


def load_f32(path: Path):
    """The checkpoint as mlx-lm reads it, every floating-point tensor (scales and biases of groups too) cast to f32."""
    model, _ = utils.load_model(path)
    model.set_dtype(mx.float32)
    return model


def greedy(model, ids: list[int]):
    """Yields the logits of each new position, [vocabulary] f32, in the steps of mlx-lm's `generate_step`:
    all of the prompt but its last token at once, then one token at a time."""
    cache = make_prompt_cache(model)
    if len(ids) > 1:
        model(mx.array([ids[:-1]]), cache=cache)
        mx.eval([layer.state for layer in cache])
    token = ids[-1]
    while True:
        logits = np.array(model(mx.array([[token]]), cache=cache)[0, -1])
        yield logits
        token = int(logits.argmax())


def gap(logits: np.ndarray) -> float:
    """How far the best token is ahead of the second, in units of the logits' root mean square."""
    second, first = np.partition(logits, -2)[-2:]
    return float((first - second) / np.sqrt(np.mean(logits * logits)))


def clear_cut_answer(model, ids: list[int]):
    """The continuation of `ids` as a golden entry and its logits [steps, vocabulary], or None where a rounding error
    could turn a choice or where it repeats itself."""
    kept, tokens, smallest = [], [], math.inf
    for step, logits in zip(range(NEW_TOKENS), greedy(model, ids)):
        smallest = min(smallest, gap(logits))
        if smallest < MIN_GAP:
            return None
        tokens.append(int(logits.argmax()))
        if step in LOGIT_STEPS:
            kept.append(logits)
    if len(set(tokens)) < MIN_DISTINCT:
        return None
    return {"ids": ids, "tokens": tokens, "smallest_gap": round(smallest, 4)}, np.stack(kept)


def find_prompt(case: Case, model, length: int):
    """Tries seeded prompts of one length until the answer is clear-cut."""
    for attempt in range(500):
        draw = np.random.Generator(np.random.PCG64([case.seed, length, attempt]))
        ids = draw.integers(0, case.config["vocab_size"], length).tolist()
        if answer := clear_cut_answer(model, ids):
            return answer
    sys.exit(f"{case.name}: no prompt of {length} tokens has a clear-cut answer; give the case another seed")


def end_ids(entries: list[dict], vocabulary: int) -> tuple[int, int]:
    """(a token that ends one answer in its middle and is in no other, a token in none)."""
    answers = [entry["tokens"] for entry in entries]
    ending = next(
        token
        for tokens in answers
        for token in tokens[8:16]
        if token not in tokens[:8] and sum(token in other for other in answers) == 1
    )
    unused = next(token for token in range(vocabulary) if not any(token in tokens for tokens in answers))
    return ending, unused


def write_end_ids(out: Path, entries: list[dict], ids: tuple[int, int]) -> None:
    """As the published Qwen3: one id in config.json, both in generation_config.json, which is the one that counts."""
    config_path = out / "config.json"
    written = json.loads(config_path.read_text())
    utils.save_config({**written, "eos_token_id": ids[1]}, config_path)
    (out / "generation_config.json").write_text(json.dumps({"do_sample": True, "eos_token_id": list(ids)}, indent=2))
    for entry in entries:
        hits = [at for at, token in enumerate(entry["tokens"]) if token in ids]
        entry["stops_after"] = hits[0] + 1 if hits else None


def make_case(case: Case, out: Path) -> None:
    """Writes one case directory."""
    write_checkpoint(case, out)
    model = load_f32(out)
    answers = [find_prompt(case, model, length) for length in PROMPT_LENGTHS]
    entries = [{**entry, "stops_after": None} for entry, _ in answers]
    if case.stops:
        write_end_ids(out, entries, end_ids(entries, case.config["vocab_size"]))
    golden = {
        "made_with": {name: version(name) for name in ("mlx", "mlx-lm", "numpy")},
        "logit_steps": LOGIT_STEPS,
        "smallest_gap": min(entry["smallest_gap"] for entry in entries),
        "prompts": entries,
    }
    (out / "golden.json").write_text(one_line_a_prompt(golden))
    mx.save_safetensors(str(out / "golden.safetensors"), {"logits": mx.array(np.stack([kept for _, kept in answers]))})


def one_line_a_prompt(golden: dict) -> str:
    """JSON that stays readable in a diff."""
    head = [f"  {json.dumps(key)}: {json.dumps(value)}," for key, value in golden.items() if key != "prompts"]
    prompts = ",\n".join("    " + json.dumps(entry) for entry in golden["prompts"])
    return "\n".join(["{", *head, '  "prompts": [', prompts, "  ]", "}", ""])


# ---- compare ------------------------------------------------------------------------------------


def difference(old: Path, new: Path) -> str | None:
    """What changed between two files, None if no byte did. MLX lays tensors out in the order of a hash table, which
    the C++ library decides: the same tensors in another order are no change of content."""
    if not old.exists() or not new.exists():
        return "new" if new.exists() else "gone"
    if old.read_bytes() == new.read_bytes():
        return None
    if old.suffix == ".safetensors":
        before, after = mx.load(str(old)), mx.load(str(new))
        if before.keys() == after.keys() and all(
            before[k].dtype == after[k].dtype and mx.array_equal(before[k], after[k]).item() for k in before
        ):
            return "same tensors, laid out differently"
    return "DIFFERENT"


def remake(cases: list[Case]) -> None:
    """Makes each case in a temporary directory, says how it differs from the one here, and puts it here."""
    for case in cases:
        with tempfile.TemporaryDirectory() as scratch:
            made, kept = Path(scratch) / case.name, HERE / case.name
            make_case(case, made)
            names = sorted({path.name for root in (made, kept) if root.exists() for path in root.iterdir()})
            changes = [f"{name}: {what}" for name in names if (what := difference(kept / name, made / name))]
            if changes:
                shutil.rmtree(kept, ignore_errors=True)
                shutil.copytree(made, kept)
            size = sum(path.stat().st_size for path in kept.iterdir())
            print(f"{case.name:<30} {size:>9,} bytes  {'; '.join(changes) or 'unchanged'}", flush=True)


def check(cases: list[Case]) -> bool:
    """Reads each case and compares tokens with mlx-lm's own `generate_step` and logits with the plain forward pass."""
    passed = True
    for case in cases:
        path = HERE / case.name
        golden = json.loads((path / "golden.json").read_text())
        logits = np.array(mx.load(str(path / "golden.safetensors"))["logits"])
        model = load_f32(path)
        error, at_once, equal = 0.0, 0.0, True
        for entry, expected in zip(golden["prompts"], logits, strict=True):
            ids, tokens = entry["ids"], entry["tokens"]
            steps = generate_step(mx.array(ids), model, max_tokens=len(tokens))
            equal &= [int(token) for token, _ in steps] == tokens
            computed = [row for _, row in zip(tokens, greedy(model, ids))]
            error = max(error, relative_error(np.stack([computed[k] for k in golden["logit_steps"]]), expected))
            whole = np.array(model(mx.array([ids + tokens]))[0])[len(ids) - 1 :]
            at_once = max(at_once, relative_error(np.stack([whole[k] for k in golden["logit_steps"]]), expected))
        good = equal and error <= MAX_LOGIT_ERROR
        passed &= good
        print(
            f"{case.name:<30} {'ok ' if good else 'BAD'}  tokens {'equal' if equal else 'DIFFER'}, "
            f"logits {error:.1e}, without a cache {at_once:.1e}, smallest gap {golden['smallest_gap']}",
            flush=True,
        )
    return passed


def relative_error(computed: np.ndarray, expected: np.ndarray) -> float:
    """The largest ||computed - expected|| / ||expected|| over the rows."""
    return float((np.linalg.norm(computed - expected, axis=-1) / np.linalg.norm(expected, axis=-1)).max())


def main() -> int:
    """Parses the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if mlx-lm answers otherwise")
    parser.add_argument("case", nargs="*", help="names of cases (default: all)")
    options = parser.parse_args()
    if unknown := set(options.case) - {case.name for case in CASES}:
        parser.error(f"no case {', '.join(sorted(unknown))}; there are {', '.join(case.name for case in CASES)}")
    cases = [case for case in CASES if not options.case or case.name in options.case]
    if options.check:
        return 0 if check(cases) else 1
    remake(cases)
    return 0


if __name__ == "__main__":
    sys.exit(main())
