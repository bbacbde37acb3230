"""The original Keras model, which `keras_peer` runs in an environment of its own: it imports nothing of this project.

Random weights at the published sizes, from the package's own functions. Proteins are padded as the package does it: to
512 tokens, longer ones to twice that, and so on, in batches that halve as the length doubles. Its states are those
after the last norms; its heads are left out. A line of JSON tells what was chosen; then each line that is read is a run
over all proteins, answered by a line.
"""

import json
import sys
import time

FIRST_LENGTH = 512
BATCHES = (1, 4, 32)  # of the first length; the package's own is 32


def buckets(lengths):
    """Numbers of the proteins of each padded length.

    Args:
        lengths: tokens of each protein.
    """
    found = {}
    for number, length in enumerate(lengths):
        padded = FIRST_LENGTH
        while padded < length:
            padded *= 2
        found.setdefault(padded, []).append(number)
    return found


def main():
    """See above."""
    answers, sys.stdout = sys.stdout, sys.stderr  # libraries print too
    job = json.loads(sys.stdin.readline())
    import numpy as np
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(job["threads"])
    tf.config.threading.set_inter_op_parallelism_threads(1)
    from proteinbert import InputEncoder, PretrainingModelGenerator
    from proteinbert.conv_and_global_attention_model import create_model
    from tensorflow import keras

    generator = PretrainingModelGenerator(create_model, job["n_annotations"], create_model_kwargs=job["sizes"])
    encoder = InputEncoder(job["n_annotations"])
    sequences = job["sequences"]
    inputs, models = {}, {}
    for length, numbers in buckets([len(sequence) + 2 for sequence in sequences]).items():
        whole = generator.create_model(length, compile=False)
        if generator.model_weights is None:
            generator.model_weights = whole.get_weights()
        last = job["sizes"]["n_blocks"]
        states = [whole.get_layer(f"{track}-merge2-norm-block{last}").output for track in ("seq", "global")]
        models[length] = keras.models.Model(whole.inputs, states)
        inputs[length] = encoder.encode_X([sequences[i] for i in numbers], length)

    def run(batch):
        results = []
        for length, (tokens, annotations) in inputs.items():
            size = max(1, batch * FIRST_LENGTH // length)
            for i in range(0, len(tokens), size):
                results.append(models[length].predict_on_batch([tokens[i : i + size], annotations[i : i + size]]))
        return results

    seconds = {}
    for batch in BATCHES:
        run(batch)  # traces and compiles its shapes
        started = time.perf_counter()
        results = run(batch)
        seconds[batch] = time.perf_counter() - started
    chosen = min(seconds, key=seconds.get)
    answers.write(
        json.dumps(
            {
                "tensorflow": tf.__version__,
                "batch": chosen,
                "lengths": {length: len(tokens) for length, (tokens, _) in inputs.items()},
                "padded": sum(tokens.size for tokens, _ in inputs.values()),
                "finite": all(bool(np.isfinite(state).all()) for result in results for state in result),
                "widths": [state.shape[-1] for state in results[0]],
            }
        )
        + "\n"
    )
    answers.flush()
    for _ in sys.stdin:
        run(chosen)
        answers.write("{}\n")
        answers.flush()


if __name__ == "__main__":
    main()
