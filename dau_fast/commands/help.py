"""Help in groups: what belongs together stands together, with examples at the end."""

from __future__ import annotations

import click

# Options by group, in the order in which help shows them; those of several commands have one group.
GROUPS = {
    "Data": ("dataset", "data", "download", "image_size", "mean", "std", "stream"),
    "Model": ("arch", "model", "checkpoint", "original", "epochs", "retrain_recipe", "prune", "sparsity"),
    "Forgetting": ("forget", "methods", "plugin", "sensitivity", "retain_sample", "tune"),
    "Comparing": ("reference", "references", "train_references", "seed", "repeats"),
    "Computing": (
        "device", "precision", "engine", "accumulate", "activation_checkpointing", "shard", "timeout",
        "profile",
    ),
    "Files": ("config", "resume", "thumbnails", "out"),
}  # fmt: skip

_MEANT = (
    "dataset", "data", "download", "image_size", "mean", "std", "stream", "arch", "model", "forget", "seed",
    "device", "precision", "out",
)  # fmt: skip
# Options of unlearning that others take: which data, models and images are meant, and how to compute.
SHARED = {"audit": {*_MEANT, "epochs"}, "evaluate": {*_MEANT, "plugin"}}

COMMANDS = {
    "unlearn": "forget, retrain and compare; the name may be left out",
    "evaluate": "measure checkpoints, and train nothing",
    "audit": "tell an unlearned checkpoint from retrained ones",
    "report": "make the page of a report.json or audit.json again",
    "attest": "state in a signed envelope what a run did",
    "verify": "check such a statement, and measure again",
    "env": "say what this runs on",
    "selfcheck": "hold every op against its definition on this machine",
}


class GroupedCommand(click.Command):
    """A command whose help shows its options by GROUPS. examples: lines, shown as they are."""

    examples: tuple[str, ...] = ()

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write a section for each group, and one for what is in none."""
        left = {parameter.name: parameter.get_help_record(ctx) for parameter in self.get_params(ctx)}
        for title, names in GROUPS.items():
            rows = [record for name in names if (record := left.pop(name, None))]
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)
        rest = [record for record in left.values() if record]
        if rest:
            with formatter.section("Other"):
                formatter.write_dl(rest)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples, and which other commands there are."""
        if self.examples:
            with formatter.section("Examples"):
                for line in self.examples:
                    formatter.write(f"{' ' * formatter.current_indent}{line}\n")
        with formatter.section("Commands"):
            formatter.write_dl([(f"dau_fast {name}", about) for name, about in COMMANDS.items()])
