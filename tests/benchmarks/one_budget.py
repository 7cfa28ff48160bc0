"""Would neurons pruned for all tokens lower what a gather loses, at equal weights read? Estimated, not measured.

For each layer the estimated KL of keeping n neurons (:func:`moedge.convert.budgets.loss_curves`) and the
distribution of every value times its Fisher score; then, price by price, each layer keeps the number of neurons that is
worth most. The table of docs/gather.md ("Would pruning or experts in the same budget help?") is

    python tests/benchmarks/one_budget.py asset:smollm2-135m-instruct --text asset:wiki --text asset:c4 --windows 2
"""

from __future__ import annotations

import argparse

import numpy as np

_SHARES = (0.75, 0.6, 0.5, 0.42)
_STEP = 32
"""Neurons between two widths that are tried."""
_AT = np.linspace(0, 1, 1001)


class Place:
    """Where values are read: what leaving the small ones out is estimated to lose, by threshold."""

    def __init__(self, ladder) -> None:
        self.weights, self.inputs, self.steps = ladder.place.weights, ladder.place.inputs, ladder.steps
        self.lost = ladder.lost

    def below(self, threshold):
        """Return (share of the values left out, KL) at a threshold of score * value."""
        share = np.interp(threshold, self.steps, _AT)
        return share, np.interp(share, _AT, self.lost)


def chosen(level, places, curves, hidden, factor):
    """Return (weights not read, KL, mean share of neurons kept) at a root of the price; ``factor`` None: no pruning."""
    width = len(curves[0]) - 1
    widths = np.arange(width, width // 4, -_STEP) if factor is not None else np.array([width])
    unread = loss = 0.0
    kept = []
    for (_, name), place in places.items():
        if name not in ("x", "h"):
            share, lost = place.below(level * np.sqrt(place.weights))
            unread, loss = unread + share * place.inputs * place.weights, loss + lost
    for layer, curve in enumerate(curves):
        x, x_loss = places[layer, "x"].below(level * np.sqrt(2.0 * widths))
        h, h_loss = places[layer, "h"].below(level * np.sqrt(hidden))
        read = (1 - x) * hidden * 2 * widths + (1 - h) * widths * hidden
        pruned = np.where(widths < width, (factor or 0.0) * curve[widths], 0.0)
        all_loss = x_loss + h_loss * widths / width + pruned
        best = int(np.argmin(all_loss + level**2 / 2 * read))
        unread, loss = unread + 3 * hidden * width - read[best], loss + all_loss[best]
        kept.append(widths[best] / width)
    return unread, loss, np.mean(kept)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", action="append", required=True)
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--factor", type=float, default=1.0, help="what pruning loses, over its estimate")
    options = parser.parse_args()

    from moedge.convert import budgets, calibration, gather, sources
    from moedge.runtime.run import held_out

    folder = sources.resolve(options.model).folder
    model, tokenizer = sources.load_model(folder), sources.load_tokenizer(folder)
    count = -(-options.windows // len(options.text))
    texts = [calibration.read_text(text) for text in options.text]
    cut = [held_out.windows(tokenizer, text, options.length, count, bos=False, name="calibration") for text in texts]
    windows = held_out.interleaved(cut)[: options.windows]
    curves = budgets.loss_curves(model, windows)
    found = gather.fisher(model, windows, "all")
    hidden = model.config.hidden_size
    whole = len(curves) * 3 * hidden * (len(curves[0]) - 1)
    for name in ("ffn", "all"):
        places = {(one.place.layer, one.place.place): Place(one) for one in found}
        places = {key: one for key, one in places.items() if name == "all" or key[1] in ("x", "h")}
        for share in _SHARES:
            levels = np.exp(np.linspace(-16, 0, 120))
            row = [f"{name:4} {share:.0%}"]
            for factor in (None, options.factor):
                table = np.array([chosen(level, places, curves, hidden, factor) for level in levels])
                read = 1 - table[:, 0] / whole
                loss, kept = (np.interp(-share, -read, table[:, column]) for column in (1, 2))
                row.append(f"KL {loss:.4f}, {kept:.1%} of the neurons")
            print(" | ".join(row), flush=True)


if __name__ == "__main__":
    main()
