"""What can be wrong with a clip call: one sentence a kind, for the record and the user."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """One thing that can be wrong; norms recorded like this carry no suggestion if it blocks.

    What blocks must be seen a few times, since a loop may begin oddly; `at_once` needs no second.
    """

    sentence: str
    blocks: bool = False
    at_once: bool = False


KINDS = {
    "clip-before-backward": Kind(
        "the clip call at {site} comes before backward(): the gradients that it clips are not "
        "those that step() uses, so it has no effect; put it between backward() and step()"
    ),
    "clip-after-step": Kind(
        "the clip call at {site} comes after optimizer.step(), so it has no effect on training; "
        "put it between backward() and step()"
    ),
    "clip-without-gradients": Kind(
        "the clip call at {site} finds no gradients, so it has no effect: it comes before "
        "backward() or after zero_grad(); put it between backward() and step()"
    ),
    "clip-nothing": Kind(
        "the clip call at {site} is given no parameters, so it clips nothing: a generator such as "
        "model.parameters() or filter(...) can be walked only once; pass a list"
    ),
    "clip-in-accumulation": Kind(
        "the clip call at {site} runs before gradient accumulation has ended, so parts of the sum "
        "are clipped and its true norm no longer exists; clip once, right before step()",
        blocks=True,
    ),
    "clip-on-scaled-gradients": Kind(
        "the clip call at {site} acts on gradients that the GradScaler still scales; call "
        "scaler.unscale_(optimizer) before it",
        blocks=True,
    ),
    "duplicate-parameters": Kind(
        "the clip call at {site} is given {n} of its parameters more than once: torch counts "
        "their norm and clips them each time; pass each parameter once",
        blocks=True,
    ),
    "clip-one-by-one": Kind(
        "the clip call at {site} clips {n} sets of parameters one by one; the norm recorded is "
        "that of all of them together, so a max_norm for it does not fit that call"
    ),
    "clip-by-parts": Kind(
        "the clip call at {site} clips {n} sets of parameters one after the other; each has a "
        "series of its own, and the norms here are those of one of them"
    ),
    "clip-by-value": Kind(
        "the clip call at {site} is clip_grad_value_, which cuts each element: its clip_value and "
        "a max_norm are different things; the norms recorded are from before it"
    ),
    "half-precision-overflow": Kind(
        "the clip call at {site} got a norm of inf from torch for finite half-precision gradients "
        "and set them to zero: those steps were lost; clip in fp32, or scale the loss down"
    ),
    "changed-in-place": Kind(
        "something changes the gradients of {site} in place between backward() and step(), and it "
        "is no clip call of torch; if the loop clips by its own arithmetic, record with "
        'measure="backward"'
    ),
    "unknown-gradients": Kind(
        "{site} steps on gradients that no backward pass put there (copies or shards, as "
        "DeepSpeed, Megatron and apex keep): record the engine's own norm with "
        "normtune.record_norm(), for DeepSpeed engine.get_global_grad_norm(); a loop that sets "
        "p.grad itself, from torch.autograd.grad, can call recorder.clip_grad_norm_() on them",
        blocks=True,
    ),
    "no-gradients": Kind(
        "{site}.step() ran without any gradient; those steps have no norm and are not recorded"
    ),
    "step-in-backward": Kind(
        "{site} steps inside backward(), one parameter at a time: the total norm never exists "
        "there, and clipping by it is impossible",
        blocks=True,
    ),
    "graph-capture": Kind(
        "a CUDA graph captures the step: hooks run at its capture only, not at its replay, so "
        "those steps are not recorded; record a run without the graph",
        blocks=True,
        at_once=True,  # a graph is captured once and replayed unseen
    ),
    "fsdp1-shards": Kind(
        "{site} steps on the shards of FSDP1, of which each rank has only its own, and the loop "
        "does not call model.clip_grad_norm_(): those steps are not recorded; call it, or move to "
        "FSDP2 (fully_shard)",
        blocks=True,
    ),
    "ranks-differ": Kind(
        "the norms of rank {own} are not those of rank {other}: the ranks do not train one "
        "synchronised model (no DDP, or its no_sync()), so each has a record of its own"
    ),
    "overruled": Kind(
        "another recorder, made later, imposes its max_norm on the same parameters ({site}), so "
        "that of this recorder is not applied"
    ),
    "lbfgs": Kind(
        "{site} evaluates its closure several times a step: the first evaluation is recorded, and "
        "clipping is unusual with it, since its line search expects the true gradient"
    ),
}


def sentence(kind: str, site: str, **facts: object) -> str:
    """The sentence of a finding.

    >>> sentence("clip-after-step", "train.py:12")[:52]
    'the clip call at train.py:12 comes after optimizer.s'
    """
    return KINDS[kind].sentence.format(site=site, **facts)
