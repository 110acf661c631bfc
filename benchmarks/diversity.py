"""How fast near-duplicates are found, against the rouge-score package on the same traces.

python benchmarks/diversity.py
"""

import random
import time

from rouge_score.rouge_scorer import RougeScorer

from pipeline.diversity import keep_diverse

TRACES, WORDS = 8, 500


def peer(texts: list[str]) -> list[int]:
    scorer = RougeScorer(["rougeL"])
    kept: list[int] = []
    for index, text in enumerate(texts):
        scores = (scorer.score(texts[other], text)["rougeL"].fmeasure for other in kept)
        if all(score <= 0.8 for score in scores):
            kept.append(index)
    return kept


def main() -> None:
    generator = random.Random(0)
    vocabulary = [f"w{number}" for number in range(300)]
    texts = [" ".join(generator.choices(vocabulary, k=WORDS)) for _ in range(TRACES)]
    seconds, results = [], []
    for keep in (keep_diverse, peer):
        started = time.perf_counter()
        results.append(keep(texts))
        seconds.append(time.perf_counter() - started)
    assert results[0] == results[1]
    print(f"{TRACES} traces of {WORDS} words: {seconds[0]:.4f} s, rouge-score {seconds[1]:.2f} s,")
    print(f"ratio {seconds[1] / seconds[0]:.0f}")


if __name__ == "__main__":
    main()
