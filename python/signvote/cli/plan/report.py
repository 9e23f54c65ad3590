"""What a person reads, and the same as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from signvote.cli.bench.report import align
from signvote.cli.plan.advise import LONGEST_STEP, WORTHWHILE, Cluster, Plan
from signvote.cli.plan.model import crowded_from
from signvote.cli.plan.units import show_rate, show_seconds
from signvote.ddp.options import TOPOLOGIES

FORMAT = 1


def label(method: str, cluster: Cluster) -> str:
    if method == "allreduce":
        return f"{cluster.dtype} all-reduce"
    return "fp16_compress_hook" if method == "fp16" else f"vote, {method}"


def header(cluster: Cluster, plans: Sequence[Plan]) -> str:
    codec, host, link = cluster.codec, cluster.host, cluster.link
    duplex = "each way" if link.full_duplex else "both ways together"
    number = " ".join(f"{plan.workers}" for plan in plans)
    return (
        f"{sum(cluster.buckets):,} parameters, {cluster.dtype}, in {len(cluster.buckets)} buckets; {number} workers; "
        f"{show_rate(link.bits_per_second)} {duplex}, {show_seconds(link.latency_seconds)} of latency\n"
        f"Measured here, ns per coordinate: pack {codec.pack * 1e9:.2f}, unpack {codec.unpack * 1e9:.2f}, vote "
        f"{codec.vote * 1e9:.4f} for each worker; gloo: {show_seconds(host.message_seconds)} for a message, "
        f"{show_seconds(host.wake_seconds)} more after a pause, {host.byte_seconds * 1e9:.2f} ns for a byte\n"
    )


def one(cluster: Cluster, plan: Plan) -> str:
    return "\n\n".join([table(cluster, plan), break_even(cluster, plan), verdict(cluster, plan)])


def table(cluster: Cluster, plan: Plan) -> str:
    """One line for each method."""
    names = [["", "MB sent", "MB received", "exchange"], ["", "by one", "worker", "seconds"]]
    if cluster.compute is None:
        names[0].append("of " + cluster.dtype)
        names[1].append("exchange")
    else:
        names[0] += ["step, exchange", "step, exchange", "of " + cluster.dtype]
        names[1] += ["after backward", "beside it", "step"]
    rows: list[list[str] | None] = [*names, None]
    plain = plan.predictions["allreduce"]
    for method, found in plan.predictions.items():
        cells = [label(method, cluster), f"{found.bytes_sent / 1e6:,.2f}", f"{found.bytes_received / 1e6:,.2f}"]
        cells.append(f"{found.exchange_seconds:,.4f}")
        if cluster.compute is not None:
            cells += [f"{found.serial_seconds:,.4f}", f"{found.step_seconds:,.4f}"]
        rows.append([*cells, f"{cluster.seconds(found) / cluster.seconds(plain):.3f}"])
    return align(rows, left=(0,))


def break_even(cluster: Cluster, plan: Plan) -> str:
    lines = []
    for method, rate in plan.break_even.items():
        what, vote = f"{label(method, cluster)} over gloo", f"the vote ({plan.topology})"
        if rate is None:
            lines.append(f"{what} takes longer than {vote} at any rate of the link.")
        elif rate == 0:
            lines.append(f"{what} takes no longer than {vote}, at any rate of the link.")
        else:
            lines.append(f"From {show_rate(rate)} on, {what} takes no longer than {vote}.")
    if cluster.compute is not None and plan.worthwhile_to == 0:
        lines.append(f"The vote saves less than {WORTHWHILE:.0%} of a step at any rate of the link.")
    elif cluster.compute is not None and plan.worthwhile_to is not None:
        lines.append(f"Up to {show_rate(plan.worthwhile_to)}, the vote saves {WORTHWHILE:.0%} of a step or more.")
    return "\n".join(lines)


def verdict(cluster: Cluster, plan: Plan) -> str:
    vote, rival = plan.predictions[plan.topology], plan.predictions[plan.rival]
    what = label(plan.rival, cluster)
    if cluster.compute is None:
        if plan.longest_step == 0:
            return f"Do not use signvote here: it saves less than {WORTHWHILE:.0%} of a step, however short, of {what}."
        if plan.longest_step == LONGEST_STEP:
            return f'Use topology="{plan.topology}".'
        return (
            f"Where a step computes for less than {show_seconds(plan.longest_step)}, the vote saves {WORTHWHILE:.0%} "
            f'of it or more: use topology="{plan.topology}" there. Where it computes for longer, do not use signvote: '
            "DDP hides most of the exchange behind the backward pass. --step-seconds says more."
        )
    times = f"{show_seconds(vote.step_seconds)} instead of {show_seconds(rival.step_seconds)} with {what}"
    change = f"{plan.saved:.0%} shorter" if plan.saved >= 0 else f"{-plan.saved:.0%} longer"
    if plan.saved >= WORTHWHILE:
        return f'Use topology="{plan.topology}": a step is {change}, {times}.'
    waiting = 1 - cluster.compute.seconds / rival.step_seconds
    return (
        f"Do not use signvote here: a step would be {change}, {times}. With one bit training needs more steps, so that "
        f"it pays from {WORTHWHILE:.0%} on, and DDP spends {waiting:.0%} of this step waiting for the exchange."
    )


def several(cluster: Cluster, plans: Sequence[Plan]) -> str:
    methods = [*cluster.rivals, *TOPOLOGIES]
    kind = "exchange" if cluster.compute is None else "step"
    rows: list[list[str] | None] = [
        ["", "MB sent", "messages", *[f"{kind}, s" for _ in methods]],
        ["workers", "sharded", "sharded", *methods],
        None,
    ]
    for plan in plans:
        sharded = plan.predictions["sharded"]
        cells = [f"{plan.workers}", f"{sharded.bytes_sent / 1e6:,.2f}", f"{sharded.messages:,}"]
        rows.append([*cells, *(f"{cluster.seconds(plan.predictions[method]):,.4f}" for method in methods)])
    largest = max(cluster.buckets)
    crowd = crowded_from(largest, cluster.link, cluster.host)
    lines = [align(rows, left=()), ""]
    if crowd >= 2:
        lines.append(
            f"From about {crowd:,.0f} workers on, a message of the largest bucket's sharded exchange "
            f"({largest / 8 / crowd / 1e3:,.1f} kB) costs the host more than the link."
        )
    else:
        lines.append("Messages of the sharded exchange cost the hosts more than the link, with any number of workers.")
    if crowd < max(plan.workers for plan in plans):
        lines.append("Beyond, every worker makes it slower: larger buckets (bucket_cap_mb) mean fewer messages.")
    return "\n".join(lines)


def write_json(path: Path, cluster: Cluster, plans: Sequence[Plan]) -> None:
    document = {"format": FORMAT, "cluster": asdict(cluster), "plans": [asdict(plan) for plan in plans]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")
