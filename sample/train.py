"""Train the sample model on a CPU: corpus, tokenizer, model, loop, save, evaluation."""

import argparse
import json
import math
import os
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    PreTrainedTokenizerFast,
)

from . import evaluate, tasks
from .corpus import stdlib_texts, task_document

END = "<|endoftext|>"


@dataclass
class Plan:
    """The choices of one training run; rates are peak learning rates."""

    minutes: float = 45.0
    vocab: int = 3072
    layers: int = 6
    hidden: int = 160
    heads: int = 5
    rotary: float = 0.5
    context: int = 256
    rows: int = 8
    task_rows: tuple[float, float] = (0.75, 0.35)  # at the beginning, at the end
    muon_rate: float = 5e-3
    adam_rate: float = 3e-3
    warm_up: float = 0.02
    begin: float = 0.0
    seed: int = 0


# ------------------------------------------------------------------------------- tokenizer


def train_tokenizer(texts: list[str], plan: Plan) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer trained on the library and on the tasks' words."""
    rng = random.Random(plan.seed)
    # documents of names stay out, or every name would become a token of its own
    mixed = texts + [
        task_document(rng, 1.0, rng.choice(["key_value", "maps"])) for _ in range(9000)
    ]
    mixed += [*tasks.PERSON, *tasks.PLACE] * 100
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=plan.vocab,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(mixed, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=END,
        eos_token=END,
        unk_token=END,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def pack(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> np.ndarray:
    """Return one stream of tokens (tokens,), each text after an <|endoftext|>."""
    coded = tokenizer.backend_tokenizer.encode_batch(texts)
    end = tokenizer.eos_token_id
    return np.concatenate([np.array([end, *line.ids], dtype=np.int32) for line in coded])


# ----------------------------------------------------------------------------------- model


def build_model(plan: Plan) -> GPTNeoXForCausalLM:
    """Return an untrained GPT-NeoX of the plan's shape."""
    config = GPTNeoXConfig(
        vocab_size=plan.vocab,
        hidden_size=plan.hidden,
        num_hidden_layers=plan.layers,
        num_attention_heads=plan.heads,
        intermediate_size=4 * plan.hidden,
        max_position_embeddings=2 * plan.context,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": plan.rotary,
        },
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
        dtype="float32",
    )
    torch.manual_seed(plan.seed)
    return GPTNeoXForCausalLM(config)


def build_optimizers(model: torch.nn.Module, plan: Plan) -> list[torch.optim.Optimizer]:
    """Return Muon for the layers' matrices and AdamW for all else, with peak rates noted."""
    named = list(model.named_parameters())
    inner = [p for n, p in named if p.ndim == 2 and ".layers." in n]
    outer = [p for n, p in named if p.ndim != 2 or ".layers." not in n]
    muon = torch.optim.Muon(
        inner, lr=plan.muon_rate, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"
    )
    adam = torch.optim.AdamW(outer, lr=plan.adam_rate, betas=(0.9, 0.98), weight_decay=0.0)
    for optimizer in (muon, adam):
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return [muon, adam]


# ------------------------------------------------------------------------------------ loop


def batches(
    stream: np.ndarray,
    tokenizer: PreTrainedTokenizerFast,
    plan: Plan,
    progress: Callable[[], float],
) -> Iterator[torch.Tensor]:
    """Yield token rows (rows, context + 1); every fourth batch has half as many, twice as long."""
    rng = random.Random(f"{plan.seed} {plan.begin}")
    step = 0
    while True:
        long = 2 if step % 4 == 3 else 1
        count, width = plan.rows // long, plan.context * long + 1
        first, last = plan.task_rows
        task_count = round(count * (first + (last - first) * progress()))
        rows = []
        for row in range(count):
            if row >= task_count:
                start = rng.randrange(len(stream) - width)
                rows.append(stream[start : start + width])
                continue
            line = np.empty(0, dtype=np.int32)
            while len(line) < width:
                texts = [task_document(rng, progress()) for _ in range(4)]
                line = np.concatenate([line, pack(tokenizer, texts)])
            rows.append(line[:width])
        yield torch.from_numpy(np.stack(rows).astype(np.int64))
        step += 1


def rate(progress: float, plan: Plan) -> float:
    """Return the factor on the peak learning rates: a linear warm-up times a cosine to zero."""
    warm = min(1.0, (progress - plan.begin) / plan.warm_up)
    return max(0.01, warm * (0.5 + 0.5 * math.cos(math.pi * progress)))


def train(
    model: GPTNeoXForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    stream: np.ndarray,
    plan: Plan,
    out: Path,
) -> dict[str, Any]:
    """Train until the time is up, with a checkpoint every five minutes; return what was done."""
    optimizers = build_optimizers(model, plan)
    start = time.monotonic()

    def progress() -> float:
        """The fraction of the schedule that has passed."""
        elapsed = (time.monotonic() - start) / (60 * plan.minutes)
        return min(1.0, plan.begin + (1 - plan.begin) * elapsed)

    steps, tokens, recent, looked, saved = 0, 0, 0.0, 0.0, 0.0
    model.train()
    for rows in batches(stream, tokenizer, plan, progress):
        if progress() == 1:
            break
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * rate(progress(), plan)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=rows[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), rows[:, 1:].flatten()
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        steps += 1
        tokens += rows[:, 1:].numel()
        recent += (loss.item() - recent) / min(steps, 50)
        minutes = (time.monotonic() - start) / 60
        if minutes - looked > max(1.0, plan.minutes / 16):
            looked = minutes
            model.eval()
            scores = evaluate.task_figures(model, tokenizer, 64, seed=-1)
            model.train()
            found = {kind: scores[kind]["accuracy"] for kind in scores}
            print(f"{minutes:5.1f} min  {steps} steps  loss {recent:.3f}  {found}", flush=True)
        if minutes - saved > 5:
            saved = minutes
            save(model, tokenizer, out)
    return {
        "steps": steps,
        "tokens": tokens,
        "minutes": plan.minutes,
        "last_loss": round(recent, 3),
    }


# --------------------------------------------------------------------- save and evaluation


def save(model: GPTNeoXForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write tokenizer, configuration and float16 weights, the weights in one rename."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(out)
    settings = json.loads((out / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # a name older releases know as well
    for name in ("is_local", "local_files_only"):  # these tell how it was loaded, not what it is
        settings.pop(name, None)
    (out / "tokenizer_config.json").write_text(
        json.dumps(settings, allow_nan=False, indent=2) + "\n"
    )
    model.config.save_pretrained(out)
    settings = json.loads((out / "config.json").read_text())
    # releases before 5 read the rotary settings from these two names
    rope = settings["rope_parameters"]
    settings["rotary_pct"] = rope["partial_rotary_factor"]
    settings["rotary_emb_base"] = rope["rope_theta"]
    (out / "config.json").write_text(json.dumps(settings, allow_nan=False, indent=2) + "\n")
    weights = {name: value.detach().half() for name, value in model.state_dict().items()}
    save_file(weights, out / "model.part", metadata={"format": "pt"})
    os.replace(out / "model.part", out / "model.safetensors")


def main() -> None:
    """Run the whole pipeline and write the model and its figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=Plan.minutes)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--start", type=Path, help="continue from this folder")
    parser.add_argument("--begin", type=float, default=0.0, help="part of the schedule done there")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    plan, out = Plan(minutes=chosen.minutes, begin=chosen.begin), chosen.out
    texts, held = stdlib_texts()
    if chosen.start:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(chosen.start)
    else:
        tokenizer = train_tokenizer(texts, plan)
    random.Random(plan.seed).shuffle(texts)
    stream = pack(tokenizer, texts)
    model = build_model(plan)
    if chosen.start:
        model.load_state_dict(
            {k: v.float() for k, v in load_file(chosen.start / "model.safetensors").items()}
        )
    size = sum(p.numel() for p in model.parameters())
    print(f"{size:,} parameters, {len(stream):,} tokens of library text", flush=True)
    done = train(model, tokenizer, stream, plan, out)
    save(model, tokenizer, out)
    report = {"plan": asdict(plan), "parameters": size, "training": done}
    model = AutoModelForCausalLM.from_pretrained(out).eval()  # what was saved is what is scored
    report |= evaluate.figures(model, tokenizer, stream, pack(tokenizer, held))
    (out / "figures.json").write_text(json.dumps(report, allow_nan=False, indent=1) + "\n")
    print(json.dumps(report, allow_nan=False, indent=1))


if __name__ == "__main__":
    main()
