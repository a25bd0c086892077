"""The tiny job of scripts/compare_trl.py as one plain PyTorch loop, a second opinion on where its curve should lie.

    python scripts/reference/torch_loop.py [SEEDS]

It needs `torch`, which the project does not: see the README beside it. Prints one JSON line: the mean reward of the ten
steps from each of the steps 60, 90 and 120 on, a list a seed, then their means.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

TINY = Path(__file__).parents[2] / "tests" / "data" / "tiny"
WINDOWS, LENGTH = (60, 90, 120), 10
PROMPTS, SAMPLES, NEW_TOKENS = 4, 8, 6
EOS = 1


def encode_prompts(tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    words = [f"w{index}" for index in range(61)]
    generators = [random.Random(index) for index in range(256)]
    texts = [" ".join(one.choice(words) for _ in range(3)) for one in generators]
    return [tokenizer.encode(text, add_special_tokens=False) for text in texts]


def train(seed: int, steps: int) -> list[float]:
    """Returns the mean reward of each step."""
    torch.manual_seed(seed)
    order = random.Random(seed)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(TINY / "tokenizer.json"))
    prompts = encode_prompts(tokenizer)
    wanted = torch.tensor(tokenizer.convert_tokens_to_ids(["w1", "w2", "w3"]))
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    waiting: list[int] = []
    curve = []
    for _ in range(steps):
        waiting = waiting or order.sample(range(len(prompts)), len(prompts))
        chosen = [waiting.pop() for _ in range(PROMPTS)]
        tokens = torch.tensor([prompts[one] for one in chosen for _ in range(SAMPLES)])
        length = tokens.shape[1]
        alive = torch.ones(len(tokens), dtype=torch.bool)
        masks = []
        with torch.no_grad():
            for _ in range(NEW_TOKENS):
                chances = torch.softmax(model(tokens).logits[:, -1], -1)
                new = torch.where(alive, torch.multinomial(chances, 1)[:, 0], 0)
                masks.append(alive)
                alive = alive & (new != EOS)
                tokens = torch.cat([tokens, new[:, None]], 1)
        mask = torch.stack(masks, 1).float()
        answers = tokens[:, length:]
        rewards = (torch.isin(answers, wanted) * mask).sum(1) / NEW_TOKENS
        groups = rewards.view(PROMPTS, SAMPLES)
        scaled = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)
        logprobs = torch.log_softmax(model(tokens).logits[:, length - 1 : -1], -1)
        logprobs = logprobs.gather(-1, answers[..., None])[..., 0]
        gains = torch.exp(logprobs - logprobs.detach()) * scaled.view(-1, 1)
        loss = -((gains * mask).sum(1) / mask.sum(1)).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        curve.append(rewards.mean().item())
    return curve


def main() -> None:
    torch.set_num_threads(1)
    seeds = int(sys.argv[1]) if sys.argv[1:] else 4
    found = []
    for seed in range(seeds):
        curve = train(seed, WINDOWS[-1] + LENGTH - 1)
        found.append([statistics.mean(curve[at - 1 : at - 1 + LENGTH]) for at in WINDOWS])
    means = [statistics.mean(column) for column in zip(*found, strict=True)]
    print(json.dumps({"steps": WINDOWS, "seeds": found, "means": means}))


if __name__ == "__main__":
    main()
