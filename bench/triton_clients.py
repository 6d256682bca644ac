"""Clients that ask for log-probs with Triton's public client, run by that client's own Python:

    python triton_clients.py PORT MODEL CLIENTS QUESTIONS ANSWERS

QUESTIONS and ANSWERS are .npz files, the first of rows of token ids. Prints {"wall": seconds of all, "each": [seconds of one call]}.
"""

from __future__ import annotations

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import tritonclient.grpc as triton


def main() -> int:
    port, model, clients, questions, answers = sys.argv[1:]
    with np.load(questions) as found:
        rows = [found[f"arr_{number}"] for number in range(len(found.files))]
    connections = [triton.InferenceServerClient(f"127.0.0.1:{port}") for _ in range(int(clients))]
    results: list[np.ndarray] = [np.empty(0)] * len(rows)

    def work(client: int) -> list[float]:
        """One call after the other."""
        seconds = []
        for number in range(client, len(rows), len(connections)):
            ids = triton.InferInput("input_ids", [1, len(rows[number])], "INT32")
            ids.set_data_from_numpy(rows[number][None])
            began = time.perf_counter()
            answer = connections[client].infer(model, [ids])
            seconds.append(time.perf_counter() - began)
            results[number] = answer.as_numpy("logprobs")[0]
        return seconds

    assert all(connection.is_model_ready(model) for connection in connections)
    with ThreadPoolExecutor(len(connections)) as pool:
        began = time.perf_counter()
        each = [seconds for client in pool.map(work, range(len(connections))) for seconds in client]
        wall = time.perf_counter() - began
    np.savez(answers, *results)
    sys.stdout.write(json.dumps({"wall": wall, "each": each}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
