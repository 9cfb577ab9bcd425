"""Every built-in data provider against the conformance kit."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from psyche_lightning.builtin import data
from psyche_lightning.data.serve import FileServer
from psyche_lightning.hookspecs import DataProvider
from psyche_lightning.testing.data import DataContract, OutageContract

Factory = Callable[..., DataProvider]


def write_tokens(folder: Path, *sizes: int) -> None:
    folder.mkdir(exist_ok=True)
    for number, size in enumerate(sizes):
        tokens = (np.arange(size) * 31 + 1000 * number) % 5000
        (folder / f"t-{number:02}.bin").write_bytes(tokens.astype("<u2").tobytes())


def write_texts(folder: Path) -> None:
    lines = [json.dumps({"text": f"number {i} squared is {i * i}"}) for i in range(60)]
    (folder / "texts.jsonl").write_text("\n".join(lines))


class TestText(DataContract):
    def make_factory(self) -> Factory:
        return data.text

    def make_config(self, folder: Path) -> dict[str, Any]:
        (folder / "text.txt").write_text("".join(f"line {number}: {number**3}\n" for number in range(60)))
        return {"seq_len": 16, "path": str(folder / "text.txt"), "validation_samples": 3}


class TestTokens(DataContract):
    def make_factory(self) -> Factory:
        return data.tokens

    def make_config(self, folder: Path) -> dict[str, Any]:
        write_tokens(folder / "data", 100, 7, 200)
        return {"seq_len": 8, "path": str(folder / "data"), "vocab_size": 5000, "validation_samples": 3}


class TestTokensInPsychesOrder(TestTokens):
    def make_config(self, folder: Path) -> dict[str, Any]:
        return {**super().make_config(folder), "shuffle": list(range(32))}


class Served:
    """A server that lives as long as a test."""

    @pytest.fixture(autouse=True)
    def _server(self, tmp_path: Path) -> Iterator[None]:
        self.server = FileServer(tmp_path)
        self.server.start()
        yield
        self.server.stop()

    @contextlib.contextmanager
    def outage(self) -> Iterator[None]:
        self.server.stop()
        try:
            yield
        finally:
            self.server.start()


class TestTokensOverHttp(Served, OutageContract):
    def make_factory(self) -> Factory:
        return data.tokens

    def make_config(self, folder: Path) -> dict[str, Any]:
        write_tokens(folder / "data", 100, 7, 200)
        return {
            "seq_len": 8,
            "url": f"{self.server.url}/data/t-{{}}.bin",
            "count": 3,
            "pad": 2,
            "vocab_size": 5000,
            "fetch": {"retry_seconds": 0.2},
        }


class TestMix(Served, OutageContract):
    def make_factory(self) -> Factory:
        return data.mix

    def make_config(self, folder: Path) -> dict[str, Any]:
        write_tokens(folder / "one", 100, 90)
        write_tokens(folder / "two", 50)
        numbered = {
            "url_template": f"{self.server.url}/one/t-{{}}.bin",
            "start_index": 0,
            "n_left_pad_zeros": 2,
            "num_files": 2,
        }
        entries = [
            ({"NumberedFiles": numbered}, {"Seeded": list(range(32))}, 0.7),
            ({"SingleUrl": f"{self.server.url}/two/t-00.bin"}, "DontShuffle", 0.3),
        ]
        providers = [
            [{"location": location, "token_size_in_bytes": "TwoBytes", "shuffle": shuffle}, weight]
            for location, shuffle, weight in entries
        ]
        (folder / "mix.json").write_text(json.dumps({"shuffle": {"Seeded": [9] * 32}, "providers": providers}))
        return {
            "seq_len": 8,
            "url": f"{self.server.url}/mix.json",
            "vocab_size": 5000,
            "validation_samples": 2,
            "fetch": {"retry_seconds": 0.2},
        }


class TestDatasets(DataContract):
    def make_factory(self) -> Factory:
        return data.datasets

    def make_config(self, folder: Path) -> dict[str, Any]:
        write_texts(folder)
        return {"seq_len": 16, "path": str(folder / "texts.jsonl"), "validation_samples": 2}


class TestDatasetsStreaming(DataContract):
    def make_factory(self) -> Factory:
        return data.datasets

    def make_config(self, folder: Path) -> dict[str, Any]:
        write_texts(folder)
        return {"seq_len": 16, "path": str(folder / "texts.jsonl"), "streaming": True, "max_samples": 50}


class TestConversations(DataContract):
    packed = True

    def make_factory(self) -> Factory:
        return data.datasets

    def make_config(self, folder: Path) -> dict[str, Any]:
        lines = [json.dumps({"prompt": f"{i} squared:", "completion": f" {i * i}"}) for i in range(60)]
        (folder / "pairs.jsonl").write_text("\n".join(lines))
        path = str(folder / "pairs.jsonl")
        return {"seq_len": 64, "path": path, "validation_samples": 2, "packed": self.packed}


class TestConversationsAlone(TestConversations):
    packed = False


class TestParquet(DataContract):
    def make_factory(self) -> Factory:
        return data.parquet

    def make_config(self, folder: Path) -> dict[str, Any]:
        import pyarrow
        from pyarrow import parquet

        (folder / "rows").mkdir(exist_ok=True)
        for number in range(2):
            rows = 20
            inputs = (np.arange(rows * 8).reshape(rows, 8) + 500 * number) % 1000
            labels = np.where(inputs % 3 == 0, -100, inputs)
            positions = np.tile(np.arange(8) % 5, (rows, 1))
            columns = {"inputs": inputs, "labels": labels, "position_ids": positions}
            table = pyarrow.table({name: values.tolist() for name, values in columns.items()})
            parquet.write_table(table, folder / "rows" / f"{number}.parquet", row_group_size=7)
        return {"seq_len": 8, "path": str(folder / "rows"), "vocab_size": 1000, "validation_samples": 4}


class TestParquetShuffled(TestParquet):
    def make_config(self, folder: Path) -> dict[str, Any]:
        return {**super().make_config(folder), "shuffle": True}
