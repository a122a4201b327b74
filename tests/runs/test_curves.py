from matplotlib.figure import Figure

from falign.runs.progress import plot_curves


def test_the_panels_say_what_every_objective_can_claim(tmp_path, monkeypatch):
    drawn, save = [], Figure.savefig

    def keep(self, *arguments, **options):
        drawn.extend(axis.get_title(loc="left") for axis in self.axes)
        save(self, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    plot_curves([{"step": 1, "loss": 0.7, "rewards/chosen": 0.1}], tmp_path / "curves.png", title="token_pairwise")
    # Rewards of token_pairwise are no β f'(u) of the sequence.
    assert drawn == ["loss", "implicit reward", "reward accuracy", "log-ratio log π/π_ref (nats)"]
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
