"""An inference row of a published table, predicted."""

from __future__ import annotations

import re

from fanfold.planner.inference import Load, Serving, batch_s, decode_s, most_sequences, prefill_s, serve
from fanfold.planner.published import Row, Unresolved, cluster_of, model_of, real, whole

# metric -> what is predicted, in the row's own unit
METRICS = {
    "ttft_mean": "ttft",
    "ttft": "ttft",
    "ttft_median": "ttft",
    "itl_mean": "itl",
    "itl": "itl",
    "itl_median": "itl",
    "tpot": "itl",
    "tpot_mean": "itl",
    "output_tokens_per_s": "output",
    "total_tokens_per_s": "total",
    "request_throughput": "requests",
    "request_latency": "latency",
    "e2e_latency": "latency",
    "prefill_latency": "prefill",
    "decode_latency": "decode",
    "ttft_p50": "ttft",
    "itl_p50": "itl",
    "tpot_median": "itl",
    "request_latency_mean": "latency",
    "output_tokens_per_s_per_device": "output_each",
    "total_tokens_per_s_per_device": "total_each",
    "prefill_tokens_per_s": "prefill_rate",
    "prompt_tokens_per_s": "prefill_rate",
    "decode_tokens_per_s": "decode_rate",
    "generation_tokens_per_s": "decode_rate",
}
RATES = ("output", "total", "requests", "output_each", "total_each", "prefill_rate", "decode_rate")


def offered(row: Row) -> float | None:
    """Requests a second that came whatever the server did; inf where all came at once."""
    text = row.get("concurrency", "").lower()
    found = re.search(r"qps\s*(inf|\d+(?:\.\d+)?)", text)
    if not found:
        return None
    return float("inf") if found[1] == "inf" else float(found[1])


def predict_row(row: Row) -> float:
    """Seconds, or tokens or requests a second."""
    kind = METRICS[row["metric"]]
    devices = whole(row, "n_devices") or whole(row, "tp") or 1
    cluster = cluster_of(row, devices)
    pipeline = whole(row, "pp") or 1
    tensor = whole(row, "tp") or max(1, devices // pipeline)
    replicas = max(1, devices // (tensor * pipeline))
    engine = _engine(row.get("framework", ""))
    weights, cache = _precisions(row)
    serving = Serving(
        model=model_of(row), precision=weights, cache_precision=cache, engine=engine, tensor=min(tensor, devices)
    )
    inputs, outputs = whole(row, "isl"), round(real(row, "osl") or 0)
    if not inputs and kind == "decode_rate":
        inputs = 512  # context matters little at batch 1
    if not inputs:
        raise Unresolved("row", found="no isl", allowed="", do="")
    if not outputs:
        outputs = 1
    at_once = whole(row, "concurrency")
    if not most_sequences(serving, cluster, 1):
        raise Unresolved("row", found="weights that fit on no such device", allowed="", do="")
    if kind == "prefill":
        return prefill_s(serving, cluster, at_once or 1, inputs) + 5e-3
    if kind == "prefill_rate":
        return (at_once or 1) * inputs / (prefill_s(serving, cluster, at_once or 1, inputs) + 5e-3)
    if kind == "decode_rate":
        return replicas * (at_once or 1) / decode_s(serving, cluster, at_once or 1, inputs + outputs / 2)
    if kind == "decode":
        return outputs * decode_s(serving, cluster, at_once or 1, inputs + outputs / 2)
    if kind == "latency" and at_once:
        return batch_s(serving, cluster, Load(input_tokens=inputs, output_tokens=outputs), at_once)
    coming = offered(row)
    asked = re.search(r"(\d[\d,]*) req", row["source"] + " " + row.get("notes", ""))
    load = Load(
        input_tokens=inputs,
        output_tokens=outputs,
        concurrency=at_once,
        requests_per_s=coming,
        requests=int(asked[1].replace(",", "")) if asked else 500,
    )
    served = serve(serving, cluster, load)
    if kind == "ttft":
        return served.ttft_s
    if kind == "itl":
        return served.itl_s
    if kind == "latency":
        return served.ttft_s + (outputs - 1) * served.itl_s
    per_request = {"output": outputs, "total": inputs + outputs, "requests": 1}[kind.removesuffix("_each")]
    rate = replicas * served.requests_per_s * per_request
    return rate / devices if kind.endswith("_each") else rate


def _engine(words: str) -> str:
    text = words.lower()
    if re.search(r"tensorrt|trt|llama.?cpp|ggml|fastertransformer|lmdeploy|jax|pope", text):
        return "native"
    return "eager" if re.search(r"mii|deepspeed|transformers|hugging", text) else "python"


def _precisions(row: Row) -> tuple[str, str]:
    text = row.get("precision", "").lower()
    if quantised := re.search(r"q([48])_|int([48]) weight|w([48])a16|awq|gptq", text):
        bits = next((one for one in quantised.groups() if one), "4")
        return f"q{bits}", "bf16"
    weights = next((name for name in ("fp8", "fp4", "int8", "int4", "bf16", "fp16", "fp32") if name in text), "bf16")
    return weights, "fp8" if "fp8" in text and "kv" in text else "bf16"


def scale(row: Row) -> float:
    """Of the row's unit: seconds, or one a second."""
    return 1e-3 if row["unit"].strip() == "ms" else 1.0


def value_of(row: Row) -> float | None:
    number = real(row, "value")
    return None if number is None else number * scale(row)
