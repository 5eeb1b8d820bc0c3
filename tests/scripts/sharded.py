"""Two ranks train in every distributed way; each writes what it saw as JSON."""

import contextlib
import json
import sys
import time
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_, clip_grads_with_norm_, get_total_norm

from normtune import NormRecorder, gradients, ranks

STEPS = 12
CLIP = 0.37
CASES = {}


def case(function):
    CASES[function.__name__] = function
    return function


def net():
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 1)
    )  # rank 1 gets none of the last


def batches(n=STEPS):
    xs = torch.randn(n, 2, 8, 6, generator=torch.Generator().manual_seed(2))
    return [(x, x.sum(-1, keepdim=True) + 3 * x[..., :1]) for x in xs]


def sgd(model, lr=0.05):
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


def train(model, optimizer, *, clip=None, data=None, before_step=None):
    """One batch a rank and step; with `clip` a function of the model."""
    for i, (x, y) in enumerate(data or batches()):
        optimizer.zero_grad()
        ((model(x[dist.get_rank()]) - y[dist.get_rank()]) ** 2).mean().backward()
        if clip is not None:
            clip(model)
        if before_step is not None:
            before_step(i)
        optimizer.step()
    return [full(p.detach()).flatten().tolist() for p in model.parameters()]


def full(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def by_torch(model):
    clip_grad_norm_(model.parameters(), CLIP)


def watched(build, folder, *, clip=None, max_norm=None, **how):
    model = build()
    optimizer = sgd(model)
    path = folder / "run.norms.jsonl"
    with NormRecorder(optimizer, path, max_norm=max_norm) as recorder:
        parameters = train(model, optimizer, clip=clip, **how)
        norms = recorder.record.norms.tolist()
    plain = None
    if max_norm is None:
        model = build()
        plain = train(model, sgd(model), clip=clip)
    kinds = [finding.kind for finding in recorder.findings]
    return {"norms": norms, "same": plain in (None, parameters), "findings": kinds,
            "parameters": parameters, "files": sorted(p.name for p in folder.iterdir())}  # fmt: skip


def ddp():
    return DistributedDataParallel(net())


def fsdp2():
    model = net()
    for layer in (model[0], model[2]):
        fully_shard(layer)
    return fully_shard(model)


def fsdp1():
    return FullyShardedDataParallel(net(), use_orig_params=True, device_id=torch.device("cpu"))


def mixed():
    """Sharded, replicated and plain parameters, over two meshes."""
    model = net()
    one = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    two = init_device_mesh("cpu", (2,), mesh_dim_names=("ep",))
    first, last = model[0], model[2]
    first.weight = nn.Parameter(distribute_tensor(first.weight.detach(), one, [Shard(0)]))
    first.bias = nn.Parameter(distribute_tensor(first.bias.detach(), one, [Replicate()]))
    last.weight = nn.Parameter(distribute_tensor(last.weight.detach(), two, [Shard(1)]))
    last.bias = nn.Parameter(distribute_tensor(last.bias.detach(), two, [Shard(0)]))
    model.scale = nn.Parameter(torch.ones(2))
    return model


def train_mixed(folder, *, clip=None, max_norm=None, drop=lambda _: None):
    model = mixed()
    optimizer = sgd(model)
    recorder = NormRecorder(optimizer, folder / "run.norms.jsonl", max_norm=max_norm)
    rows, true = torch.tensor([0.3, -0.7]), []
    for i in range(STEPS):
        optimizer.zero_grad()
        total = sum((full_gradient(p) * (i + 1)).sin().sum() for p in model.parameters())
        (total + (model.scale * rows).sum()).backward()
        drop(model)
        true.append(slow_norm(model))
        if clip is not None:
            clip(model)
        optimizer.step()
    recorder.close()
    record = recorder._buffer.store.record()
    end = [full(p.detach()).flatten().tolist() for p in model.parameters()]
    return {"norms": record.norms.tolist(), "true": true, "parameters": end}


def slow_norm(model):
    """Every shard by itself, one reduction for each parameter."""
    total = 0.0
    for p in model.parameters():
        local = getattr(p.grad, "_local_tensor", p.grad)
        square = torch.zeros(()).double() if local is None else local.double().pow(2).sum()
        if isinstance(p, DTensor) and any(placement.is_shard() for placement in p.placements):
            dist.all_reduce(square)
        total += square.item()
    return total**0.5


def full_gradient(parameter):
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


@case
def ddp_with_clip(folder):
    return watched(ddp, folder, clip=by_torch)


@case
def ddp_without_clip(folder):
    return watched(ddp, folder)


@case
def ddp_accumulating(folder):
    """Two micro-batches a step, the first in no_sync()."""
    model = ddp()
    optimizer = sgd(model)
    recorder = NormRecorder(optimizer)
    rank, true = dist.get_rank(), []
    for x, y in batches():
        optimizer.zero_grad()
        for half in (slice(4), slice(4, 8)):
            with model.no_sync() if half.stop == 4 else contextlib.nullcontext():
                (((model(x[rank, half]) - y[rank, half]) ** 2).mean() / 2).backward()
        true.append(torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item())
        clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
    return {"norms": recorder.record.norms.tolist(), "true": true,
            "findings": [f.kind for f in recorder.findings]}  # fmt: skip


@case
def fsdp2_with_clip(folder):
    return watched(fsdp2, folder, clip=by_torch)


@case
def fsdp2_without_clip(folder):
    return watched(fsdp2, folder)


@case
def fsdp2_imposed(folder):
    """Once in place of the loop's clipping, once where it does not clip."""
    model = fsdp2()

    def at(max_norm):
        return lambda m: clip_grad_norm_(m.parameters(), max_norm)

    asked = train(model, sgd(model), clip=at(0.21))
    instead = watched(fsdp2, folder, clip=by_torch, max_norm=0.21)
    added = watched(fsdp2, folder, max_norm=0.21)
    return {"asked": asked, "instead": instead["parameters"], "added": added["parameters"]}


@case
def fsdp1_with_its_own_clip(folder):
    return watched(fsdp1, folder, clip=lambda model: model.clip_grad_norm_(CLIP))


@case
def fsdp1_imposed(folder):
    model = fsdp1()
    asked = train(model, sgd(model), clip=lambda m: m.clip_grad_norm_(0.21))
    imposed = watched(fsdp1, folder, clip=lambda m: m.clip_grad_norm_(CLIP), max_norm=0.21)
    free = watched(fsdp1, folder, clip=lambda m: m.clip_grad_norm_(CLIP), max_norm=float("inf"))
    model = fsdp1()
    never = train(model, sgd(model))
    return {"asked": asked, "imposed": imposed["parameters"],
            "never": never, "free": free["parameters"]}  # fmt: skip


@case
def fsdp1_without_clip(folder):
    model = fsdp1()
    optimizer = sgd(model)
    with NormRecorder(optimizer) as recorder:
        train(model, optimizer)
    return {"steps": recorder.n_steps, "findings": [f.kind for f in recorder.findings]}


@case
def mixed_without_clip(folder):
    return train_mixed(folder)


@case
def mixed_with_a_rank_that_lacks_gradients(folder):
    """No early return before a reduction that the other rank waits for."""

    def drop(model):
        if dist.get_rank() == 1:
            model[2].weight.grad = model[2].bias.grad = None

    return train_mixed(folder, drop=drop)


@case
def mixed_imposed(folder):
    """By normtune, and by the arithmetic of the plain slow way."""

    def by_hand(model):
        whole = [full(p.grad).flatten() for p in model.parameters()]
        factor = min(1.0, 0.21 / (torch.cat(whole).norm().item() + 1e-6))
        for p in model.parameters():
            getattr(p.grad, "_local_tensor", p.grad).mul_(factor)

    own = train_mixed(folder, max_norm=0.21)
    hand = train_mixed(folder, clip=by_hand)
    return {"own": own["parameters"], "hand": hand["parameters"], **own}


@case
def mixed_with_one_norm_for_each_mesh(folder):
    """As torchtitan does: the total over all meshes, given to one call for each of them."""

    def clip(model):
        sets = {}
        for p in model.parameters():
            sets.setdefault(getattr(p, "device_mesh", None), []).append(p)
        parts = [full(get_total_norm([p.grad for p in some])) for some in sets.values()]
        total = torch.linalg.vector_norm(torch.stack(parts))
        for some in sets.values():
            clip_grads_with_norm_(some, CLIP, total)

    return train_mixed(folder, clip=clip)


@case
def recorder_on_rank_0_only(folder):
    """Sharded and without a clip call, the norm would need the other rank."""
    ranks.MEET_SECONDS = 1.0
    model = fsdp2()
    optimizer = sgd(model)
    said = []
    if dist.get_rank() == 0:
        recorder = NormRecorder(optimizer)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            parameters = train(model, optimizer)
        said = [str(w.message) for w in caught if "normtune" in str(w.message)]
        recorder.close()
    else:
        parameters = train(model, optimizer)
        NormRecorder(torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1)).close()  # keeps count
    model = fsdp2()
    return {"said": said, "same": parameters == train(model, sgd(model))}


@case
def recorder_on_rank_0_only_with_clip(folder):
    """The loop's own clip has the norm already, and rank 0 needs nobody."""
    model = fsdp2()
    optimizer = sgd(model)
    first = dist.get_rank() == 0
    watch = optimizer if first else torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1)
    with NormRecorder(watch) as recorder:
        train(model, optimizer, clip=by_torch)
        return {"norms": recorder.record.norms.tolist() if first else None}


@case
def rank_0_closes_early(folder):
    model = fsdp2()
    optimizer = sgd(model)
    recorder = NormRecorder(optimizer)

    def stop(step):
        if step == 5 and dist.get_rank() == 0:
            time.sleep(0.2)  # rank 1 waits for the norm of this step already
            recorder.close()

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(model, optimizer, before_step=stop)
    said = [str(w.message) for w in caught if "normtune" in str(w.message)]
    return {"steps": recorder.n_steps, "said": said}


@case
def a_norm_that_an_engine_knows(folder):
    """A sharded total, as get_total_norm returns it: no format string and no item() fits it."""
    model = fsdp2()
    optimizer = sgd(model)
    recorder = NormRecorder(None, folder / "run.norms.jsonl")
    true, kinds = [], set()

    def tell(model):
        total = get_total_norm([p.grad for p in model.parameters()])
        kinds.add(type(total).__name__)
        true.append(full(total).item())
        recorder.record_norm(total)

    train(model, optimizer, clip=tell)
    said = repr(recorder)
    return {"norms": recorder.record.norms.tolist(), "true": true, "kinds": list(kinds),
            "said": said}  # fmt: skip


def breaking(folder, rank, break_it, **options):
    """From its sixth step on something goes wrong in the recorder of one rank."""
    model = fsdp2()
    optimizer = sgd(model)
    recorder = NormRecorder(optimizer, folder / "run.norms.jsonl", **options)

    def fail(*_, **__):
        message = "broken"
        raise ValueError(message)

    def at(step):
        if step == 5 and dist.get_rank() == rank:
            break_it(recorder, fail)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        parameters = train(model, optimizer, before_step=at)
    said = [str(w.message) for w in caught if "normtune" in str(w.message)]
    model = fsdp2()
    same = parameters == train(model, sgd(model))
    return {"steps": recorder.n_steps, "said": said, "same": same}


@case
def a_store_that_fails_on_rank_1(folder):
    """After the norm of the step, in each write."""

    def break_it(recorder, fail):
        recorder._buffer.store.rows = fail

    return breaking(folder, 1, break_it, flush_every=1)


@case
def a_hook_that_fails_on_rank_0(folder):
    """Before the norm of the step, for which rank 1 waits already."""

    def break_it(recorder, fail):
        time.sleep(0.1)
        recorder._listen_to_new = fail

    return breaking(folder, 0, break_it)


@case
def a_norm_that_fails_on_rank_1(folder):
    """In the rank's own part of it."""
    kept = gradients.norms_of_each

    def break_it(recorder, fail):
        gradients.norms_of_each = fail

    try:
        return breaking(folder, 1, break_it)
    finally:
        gradients.norms_of_each = kept


@case
def ranks_of_their_own(folder):
    """Each rank trains a model by itself."""
    return watched(net, folder)


def main(folder):
    dist.init_process_group("gloo")
    results = {}
    for name, function in CASES.items():
        own = Path(folder) / name
        own.mkdir(exist_ok=True)
        dist.barrier()
        started = time.monotonic()
        results[name] = function(own) | {"seconds": time.monotonic() - started}
        dist.barrier()
        if "files" in results[name]:
            results[name]["files"] = sorted(p.name for p in own.iterdir())
    (Path(folder) / f"{dist.get_rank()}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1])
