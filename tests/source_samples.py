"""Small logs of every family, as their frameworks write them, with what they hold."""

from __future__ import annotations

import json
import struct
import zlib
from dataclasses import dataclass

from normtune.sources.tensorboard import masked_crc

N = 40
NORMS = [round(0.4 + 0.013 * i + 0.11 * (i * i % 7), 4) for i in range(N)]
TENS = [10 * (i + 1) for i in range(N)]
ONES = [i + 1 for i in range(N)]


@dataclass(frozen=True)
class Sample:
    """One log.

    Attributes:
        name: The name of its file.
        content: Its bytes.
        key: The key that a reader takes.
        steps: The steps, None where it has none.
        side: Which side of clipping.
        value: What a value stands for.
        norms: The values.
        max_norm: The max_norm that it states.
    """

    name: str
    content: bytes
    key: str
    steps: list[int] | None
    side: str
    value: str
    norms: list[float]
    max_norm: float | None = None


def _lines(line, steps=TENS):
    return "".join(
        line(step, norm) + "\n" for step, norm in zip(steps, NORMS, strict=True)
    ).encode()


def _text(name, line, *, key="grad_norm", steps=TENS, side="before", value, head="", **rest):
    content = head.encode() + _lines(line, steps or ONES)
    return Sample(f"{name}.log", content, key, steps, side, value, NORMS, **rest)


LAST, MEAN = "last of window", "mean of window"


def trainer_state(norms=NORMS, steps=TENS, **extra):
    """A Hugging Face trainer_state.json, with an evaluation after every fourth row."""
    history = []
    for step, norm in zip(steps, norms, strict=True):
        row = {"epoch": step / 100, "grad_norm": norm, "learning_rate": 1e-4, "loss": 2.0}
        history.append(row | {"step": step})
        if step % 40 == 0:
            history.append({"epoch": step / 100, "eval_loss": 1.9, "step": step})
    state = {
        "best_metric": None,
        "global_step": steps[-1],
        "log_history": history,
        "max_steps": 500,
    }
    return json.dumps(state | extra, indent=2, sort_keys=True).encode()


def hf_console(norms, *, quoted, epochs=None):
    """The dictionaries that the Trainer prints between its progress bars."""
    text = []
    for i, norm in enumerate(norms):
        shown = f"'{norm:.4g}'" if quoted else repr(norm)
        epoch = (epochs or [0.01 * (k + 1) for k in range(len(norms))])[i]
        text.append(f"\r {i}%|##   | {i}/{len(norms)} [00:{i:02d}<00:10, 1.05s/it]")
        text.append(f"\r\x1b[A{{'loss': 1.5, 'grad_norm': {shown}, 'epoch': {epoch}}}\n")
    return "".join(text).encode()


# --- binary formats ------------------------------------------------------------------------------


def varint(value):
    """A number in protobuf's variable length."""
    value &= (1 << 64) - 1
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def field(number, content):
    """A protobuf field: an int as varint, bytes with their length."""
    if isinstance(content, int):
        return varint(number << 3) + varint(content)
    return varint(number << 3 | 2) + varint(len(content)) + content


def fixed32(number, value):
    """A protobuf float."""
    return varint(number << 3 | 5) + struct.pack("<f", value)


def tfrecord(payload):
    """One record of an event file."""
    length = struct.pack("<Q", len(payload))
    crcs = [struct.pack("<I", masked_crc(part)) for part in (length, payload)]
    return length + crcs[0] + payload + crcs[1]


def scalar_event(step, tag, value, *, tensor=False):
    """An event that holds one scalar, in the one or the other encoding."""
    if tensor:
        inner = field(8, field(1, 1) + field(2, b"") + field(4, struct.pack("<f", value)))
    else:
        inner = fixed32(2, value)
    summary = field(1, field(1, tag.encode()) + inner)
    clock = varint(1 << 3 | 1) + struct.pack("<d", 1.7e9 + step)
    return tfrecord(clock + field(2, step) + field(5, summary))


def text_event(tag, text):
    """An event that holds a text summary."""
    tensor = field(8, field(1, 7) + field(8, text.encode()))
    return tfrecord(field(5, field(1, field(1, tag.encode()) + tensor)))


def events(tags, *, steps=TENS, norms=NORMS, tensor=False, head=b""):
    """An event file with the norms under the first tag and a loss under each other one."""
    version = tfrecord(varint(1 << 3 | 1) + struct.pack("<d", 1.7e9) + field(3, b"brain.Event:2"))
    body = b"".join(
        scalar_event(step, tag, norm if tag == tags[0] else 2.5, tensor=tensor)
        for step, norm in zip(steps, norms, strict=True)
        for tag in tags
    )
    return version + head + body


def wandb_items(row, *, number=1, nested=False):
    """The items of a history or config message."""
    out = b""
    for key, value in row.items():
        names = key.split("/") if nested else []
        name = b"".join(field(2, part.encode()) for part in names) or field(1, key.encode())
        out += field(number, name + field(16, json.dumps(value).encode()))
    return out


def wandb_file(rows, config, *, nested=False):
    """An offline W&B file: 32 KiB blocks of records in fragments, as LevelDB's logs."""
    records = [field(1, 1) + field(17, field(1, b"run") + field(4, wandb_items(config)))]
    records += [
        field(1, i + 2) + field(2, wandb_items(row, nested=nested)) for i, row in enumerate(rows)
    ]
    out = bytearray(b":W&B" + struct.pack("<HB", 0xBEE1, 0))
    for record in records:
        _append(out, record)
    return bytes(out)


def _append(out, record):
    first = True
    while True:
        left = 32768 - len(out) % 32768
        if left < 7:
            out += b"\0" * left
            left = 32768
        part, record = record[: left - 7], record[left - 7 :]
        kind = (1 if not record else 2) if first else (4 if not record else 3)
        crc = zlib.crc32(part, zlib.crc32(bytes([kind])))
        out += struct.pack("<IHB", crc, len(part), kind) + part
        first = False
        if not record:
            return


_HF_ROWS = [
    {
        "train/grad_norm": norm,
        "train/loss": 2.0,
        "train/global_step": step,
        "_step": i,
        "pad": "x" * 900,
    }
    for i, (step, norm) in enumerate(zip(TENS, NORMS, strict=True))
]
_MMCV_STEPS = [50 * (i + 1) for i in range(N)]
_HALF = N // 2
_OLMO = "".join(
    f"2025-12-21 12:16\thost:0\tolmo.train:990\tINFO\t[step={step}/7640,epoch=0]\n"
    f"    optim/total_grad_norm={norm:.4g}\n    optim/grad_norm_x=12\n    train/Loss=1,234\n"
    for step, norm in zip(TENS, NORMS, strict=True)
).encode()
_BIG = [1230.0 + 10 * i for i in range(N)]


def _f32(values):
    return [struct.unpack("<f", struct.pack("<f", value))[0] for value in values]


def _csv(header, row, steps=TENS):
    return (header + "\n").encode() + _lines(row, steps)


SAMPLES = (
    Sample("trainer_state.json", trainer_state(), "grad_norm", TENS, "before", LAST, NORMS),
    Sample("v4.txt", hf_console(NORMS, quoted=False), "grad_norm", None, "before", LAST, NORMS),
    Sample("v5.txt", hf_console(NORMS, quoted=True), "grad_norm", None, "before", LAST, NORMS),
    Sample("events.out.tfevents.1.h", events(["train/grad_norm", "train/epoch"]), "train/grad_norm",
           TENS, "before", LAST, _f32(NORMS)),
    Sample("events.out.tfevents.2.h.v2", events(["grad_norm", "loss"], tensor=True), "grad_norm",
           TENS, "unknown", "unknown", _f32(NORMS)),
    Sample("events.out.tfevents.3.h",
           events(["grad-norm", "grad-norm vs samples"], head=text_event("clip_grad/text_summary", "1.0")),
           "grad-norm", TENS, "before", LAST, _f32(NORMS), 1.0),
    Sample("run-ab12.wandb", wandb_file(_HF_ROWS, {"max_grad_norm": 0.3}), "train/grad_norm", TENS,
           "before", LAST, NORMS, 0.3),
    Sample("run-cd34.wandb", wandb_file(
        [{"optim/total_grad_norm": n, "_step": s} for s, n in zip(TENS, NORMS, strict=True)],
        {"optimizer": {"max_grad_norm": 1.0}}, nested=True),
        "optim/total_grad_norm", TENS, "before", LAST, NORMS, 1.0),
    Sample("wandb_export.csv", _csv(
        '"Step","run 1 - train/grad_norm","run 1 - train/grad_norm__MIN","run 1 - train/grad_norm__MAX"',
        lambda s, n: f'"{s}","{n}","{n}","{n}"'), "run 1 - train/grad_norm", TENS, "unknown", "unknown", NORMS),
    Sample("metrics.csv", _csv(
        "epoch,grad_2.0_norm/layer.weight,grad_2.0_norm_total,step,train_loss,val_loss",
        lambda s, n: f"0,0.1,{n},{s},2.5,\n0,,,{s},,2.4"), "grad_2.0_norm_total", TENS, "before", LAST, NORMS),
    Sample("grad_norm.csv", _csv("Wall time,Step,Value", lambda s, n: f"{1.7e9 + s},{s},{n}"),
           "grad_norm", TENS, "unknown", "unknown", NORMS),
    Sample("run-x-tag-train_grad_norm.csv", _csv("Wall time,Step,Value", lambda s, n: f"{1.7e9 + s},{s},{n}"),
           "train_grad_norm", TENS, "unknown", "unknown", NORMS),
    Sample("measurements.csv", _csv(
        "global_step,grad_norm,loss,preemption_count", lambda s, n: f"{s},{n},2.5,\n{s},,,0.0"),
        "grad_norm", TENS, "unknown", "each step", NORMS),
    Sample("layers.tsv", _csv("step\tgrad_total\tlayer_0", lambda s, n: f"{s}\t{n}\t0.1"), "grad_total",
           TENS, "unknown", "unknown", NORMS),
    Sample("only.csv", _csv("grad_norm", lambda _, n: f"{n}"), "grad_norm", None, "unknown", "unknown", NORMS),
    Sample("train_log.jsonl", _lines(lambda s, n: json.dumps(
        {"step": s, "grad_norm": n, "loss": 1.0, "param_norm": 1379.4, "x/mu_norm": 0.1})),
        "grad_norm", TENS, "before", MEAN, NORMS),
    Sample("logging.jsonl", _lines(lambda s, n: "\n".join([json.dumps(
        {"loss": 1.0, "grad_norm": n, "global_step/max_steps": f"{s}/500", "train_speed(iter/s)": 1.0})] * 2)),
        "grad_norm", TENS, "before", LAST, NORMS),
    Sample("lingua.jsonl", _lines(lambda s, n: "\n".join(json.dumps(
        {"global_step": s, "acc_step": a, "optim/grad_norm": v, "speed/wps": 9.0}) for a, v in ((1, -1.0), (0, n)))),
        "optim/grad_norm", TENS, "before", LAST, NORMS),
    Sample("maxtext.jsonl", _lines(lambda s, n: json.dumps(
        {"step": s, "learning/grad_norm": min(n, 0.5), "learning/raw_grad_norm": n})),
        "learning/raw_grad_norm", TENS, "before", LAST, NORMS),
    Sample("big_vision_metrics.txt", _lines(lambda s, n: json.dumps({"step": s, "l2_grads": n, "l2_params": 9.0})),
           "l2_grads", TENS, "before", LAST, NORMS),
    Sample("result.json", _lines(lambda s, n: json.dumps({"training_iteration": s, "info": {"learner": {
        "default_policy": {"learner_stats": {"grad_gnorm": n, "policy_loss": 0.1}}}}})),
        "info/learner/default_policy/learner_stats/grad_gnorm", TENS, "after", MEAN, NORMS),
    Sample("1.log.json", (json.dumps({"env_info": "x", "config": "optimizer_config = dict(grad_clip=dict("
           "max_norm=35, norm_type=2))\n" + "#" * 70_000}) + "\n").encode() + b"".join(
        json.dumps({"mode": "train", "epoch": 1 + i // _HALF, "iter": 50 * (i % _HALF + 1), "grad_norm": norm,
                    "data_time": 0.1}).encode() + b"\n" for i, norm in enumerate(NORMS)),
        "grad_norm", _MMCV_STEPS, "before", MEAN, NORMS, 35.0),
    Sample("scalars.json", _lines(lambda s, n: json.dumps(
        {"lr": 0.1, "data_time": 0.1, "grad_norm": n, "loss": 1.0, "iter": s, "step": s})),
        "grad_norm", TENS, "before", MEAN, NORMS),
    Sample("metrics.json", json.dumps([row for s, n in zip(TENS, NORMS, strict=True) for row in (
        {"step": s, "train/grad_norm_before_clip": n, "train/grad_norm_after_clip": min(n, 0.5)},
        {"step": s, "lr": 0.1})], indent=1).encode(), "train/grad_norm_before_clip", TENS, "before", "unknown", NORMS),
    Sample("sft.json", json.dumps({"config": {"max_steps": "50"}, "grad_norm": NORMS}).encode(), "grad_norm",
           None, "unknown", "unknown", NORMS),
    Sample("sacred.json", json.dumps({"grad_norm": {"steps": TENS, "values": NORMS}}).encode(), "grad_norm",
           TENS, "unknown", "unknown", NORMS),
    Sample("grad_norms.json", json.dumps([[1.7e9, s, n] for s, n in zip(TENS, NORMS, strict=True)]).encode(),
           "grad_norms", TENS, "unknown", "unknown", NORMS),
    Sample("strict.jsonl", _lines(lambda s, n: json.dumps({"step": s, "gradient_norm": f"np.float64({n})"})),
           "gradient_norm", TENS, "unknown", "unknown", NORMS),
    _text("titan", lambda s, n: f"[rank0]:[titan] 2025-01-01 - root - INFO - \x1b[31mstep: {s:2d}  \x1b[32mloss:  8.5"
          f"  \x1b[38;2;180;60;0mgrad_norm: {n:7.4f}  \x1b[36mmemory: 24.29GiB\x1b[39m", value=LAST,
          head='[rank0]:    "max_norm": 1.0,\n', max_norm=1.0),
    _text("torchtune", lambda s, n: f"Step {s} | loss:1.2 lr:2e-05 grad_norm:{n} ", value=LAST),
    _text("megatron", lambda s, n: f" iteration {s:8d}/    1000 | consumed samples: 1024 | grad norm: {n:.4f} |"
          " number of nan iterations:   0 |\ntime (ms) | optimizer-clip-main-grad: 55.00", key="grad norm", value=LAST,
          head="  clip_grad ....................... 1.0\n  log_params_norm .......... False\n", max_norm=1.0),
    _text("nanotron", lambda s, n: f"iteration: {s} / 500 | lm_loss: 1.5 | grad_norm: {n} | hours: 1", value=LAST),
    _text("nanogpt", lambda s, n: f"step {s:4d} | loss: 3.1 | lr 6e-4 | norm: {n:.4f} | dt: 9ms", key="norm",
          value="each step"),
    _text("llmc", lambda s, n: f"s:{s} tel:9.79 trl:9.7924 lr:0.000011 norm:{n}", key="norm", value="each step"),
    _text("llmc_stdout", lambda s, n: f"step {s:4d}/500 | loss 7.1 (+1.2z)| norm {n:.4f} (+1.2z)| lr 6e-4", key="norm",
          value="each step"),
    _text("mmcv", lambda s, n: f"2022 - mmdet - INFO - Epoch [1][{s}/1995]\tlr: 1e-06, loss: 1.1, grad_norm: {n}",
          value=MEAN, steps=TENS, head="optimizer_config = dict(grad_clip=dict(max_norm=35, norm_type=2))\n",
          max_norm=35.0),
    _text("mmengine", lambda s, n: f"2023 - mmengine - INFO - Iter(train) [ {s}/80000]  lr: 1e-2  grad_norm: {n}",
          value=MEAN),
    _text("swin", lambda s, n: f"INFO Train: [0/300][{s}/924]\teta 0:00:25 loss 0.1 (0.2)\tgrad_norm {n:.4f} (9.9100)",
          value=LAST, head="TRAIN:\n  CLIP_GRAD: 5.0\n", max_norm=5.0),
    _text("espnet", lambda s, n: f"1epoch:train:{s - 9}-{s}batch: loss=80.1, grad_norm={n}, clip=100.000, loss_scale=1.0",
          value=MEAN),
    _text("verl", lambda s, n: f"step:{s} - critic/kl:0.1 - actor/grad_norm:np.float64({n}) - perf/x:1", key="actor/grad_norm",
          value=MEAN),
    _text("fairseq", lambda s, n: f'[2022-04-08][train_inner][INFO] - {{"epoch": 1, "gnorm": "{n}", "num_updates": "{s}"}}\n'
          f'[2022-04-08][train][INFO] - {{"epoch": 1, "train_gnorm": "9.0", "train_num_updates": "{s}"}}', key="gnorm",
          value=MEAN, head="{'optimization': {'clip_norm': 25.0, 'lr': 1}}\n", max_norm=25.0),
    _text("fairseq_simple", lambda s, n: f"| INFO | train_inner | epoch 001: 10 / 99 loss=8, num_updates={s}, gnorm={n},"
          " clip=100", key="gnorm", value=MEAN),
    _text("lingua", lambda s, n: f"0: INFO 25-01-01 - step: {s}  acc: 0  loss:   1.5  grad: {n}  flops: 1e+13", value=LAST),
    _text("lerobot", lambda s, n: f"INFO step:{s} smpl:1K ep:1 epch:0.1 loss:0.5 grdn:{n} lr:1e-5", key="grdn", value=MEAN),
    _text("openpi", lambda s, n: f"Step {s}: grad_norm={n}, loss=0.1, param_norm=1802.1", value=MEAN),
    _text("algoperf", lambda s, n: f"I0316 x.py:48] [{s}] global_step={s}, grad_norm={n}, loss=0.4\n"
          f"I0316 submission.py:265] {s}) loss = 0.410, grad_norm = {n}", side="unknown", value="each step"),
    _text("modded", lambda s, n: f"step:{s}/20000 train_loss:6.9 grad_norm:{n:.4f} lr_scale:1.0 step_avg:94.2ms",
          side="unknown", value="unknown"),
    _text("own", lambda s, n: f"Epoch 1, Iteration {s}: Loss = 2.1, Gradient Norm = {n}", key="Gradient Norm",
          side="unknown", value="unknown"),
    Sample("olmo.log", b"  max_grad_norm=1.0, max_grad_norm_ratio=None\n" + _OLMO, "optim/total_grad_norm", TENS,
           "before", LAST, [float(f"{n:.4g}") for n in NORMS], 1.0),
    Sample("big.log", b"".join(f"iteration: {s} / 9 | grad_norm: {n / 1000}K | x\n".encode()
           for s, n in zip(TENS, _BIG, strict=True)), "grad_norm", TENS, "before", LAST, _BIG),
    Sample("thousands.log", b"".join(f"[step={s}/9]\n    optim/total grad norm={n:,.0f}\n".encode()
           for s, n in zip(TENS, _BIG, strict=True)), "optim/total grad norm", TENS, "before", LAST, _BIG),
    Sample("composer.log", b"".join(f"[batch={s}/3200]:\n\t Train l2_norm/grad/global: {n}\n".encode()
           for s, n in zip(TENS, NORMS, strict=True)), "l2_norm/grad/global", TENS, "after", LAST, NORMS),
    Sample("pretty.log", b"starting\n" + b"".join(
        f'INFO metrics:\n{{\n  "loss": 1.0,\n  "grad_norm": {n},\n  "step": {s}\n}}\n'.encode()
        for s, n in zip(TENS, NORMS, strict=True)), "grad_norm", TENS, "unknown", "unknown", NORMS),
)  # fmt: skip
