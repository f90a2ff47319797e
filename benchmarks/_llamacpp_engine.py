"""Runs where llama-cpp-python is installed: a job per line of stdin, an answer per line of stdout, both JSON."""

import json
import os
import sys
import time
from pathlib import Path

import llama_cpp
import numpy as np

HERE = {}
"""The model that `load` leaves for `prompt` and `decode`, and the memory before it."""


def made(path, context, threads, exact):
    more = {"type_k": 0, "type_v": 0, "flash_attn": False, "logits_all": True} if exact else {}
    return llama_cpp.Llama(path, n_ctx=context, n_threads=threads, n_threads_batch=threads, verbose=False, **more)


def check(job):
    model = made(job["path"], 256, 1, True)
    logits = []
    for prompt in job["prompts"]:
        model.reset()
        model.eval(prompt)
        logits.append(np.array(model.scores[len(prompt) - 1]))
    np.save(job["out"], np.array(logits))
    texts = []
    for prompt in job["greedy"]:
        model.reset()
        model.eval(prompt)
        new = []
        for _ in range(job["new"]):
            new.append(int(np.argmax(model.scores[model.n_tokens - 1])))
            model.eval(new[-1:])
        texts.append(new)
    tokens = [model.tokenize(text.encode(), add_bos=True, special=True) for text in job["texts"]]
    return {"greedy": texts, "tokens": tokens}


def speed(job):
    models = [made(path, 512, job["threads"], False) for path in job["paths"]]
    prompt = [3 + i * 37 % 8000 for i in range(job["prompt"])]
    rounds = []
    for _ in range(job["repeats"] + 1):
        row = []
        for model in models:
            model.reset()
            start = time.perf_counter()
            model.eval(prompt)
            middle = time.perf_counter()
            for i in range(job["new"]):
                model.eval([5 + i])
            row.append([len(prompt) / (middle - start), job["new"] / (time.perf_counter() - middle)])
        rounds.append(row)
    return rounds[1:]


def resident(field):
    """Bytes of this process's resident set: now (VmRSS) or at most so far (VmHWM); None where the system hides it."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def load(job):
    HERE["before"] = resident("VmRSS")
    HERE["model"] = made(job["path"], job["context"], job["threads"], False)


def prompt(job):
    HERE["model"].eval([i * 37 % HERE["model"].n_vocab() for i in range(job["tokens"])])
    HERE["prompt"] = HERE["model"].n_tokens


def decode(job):
    """Seconds of each token decoded after the prompt: `new` of them, none begun after `limit` seconds."""
    model, seconds = HERE["model"], []
    model.n_tokens = HERE["prompt"]  # the next eval removes what comes after it from the cache
    while len(seconds) < job["new"] and (not seconds or sum(seconds) < job["limit"]):
        began = time.perf_counter()
        model.eval([5 + len(seconds)])
        seconds.append(time.perf_counter() - began)
    return seconds


def peak(_):
    most = resident("VmHWM")
    return None if most is None or HERE["before"] is None else most - HERE["before"]


JOBS = {"check": check, "speed": speed, "load": load, "prompt": prompt, "decode": decode, "peak": peak}

if __name__ == "__main__":
    out = os.fdopen(os.dup(1), "w")  # llama.cpp takes the first one for itself now and then
    for line in sys.stdin:
        work = json.loads(line)
        print(json.dumps(JOBS[work["kind"]](work)), file=out, flush=True)
