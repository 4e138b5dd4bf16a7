"""Graphs whose nodes are samples: sources, splits, and what of a graph may be seen in training.

Shapes: N nodes, E directed edges, F features of a node, C classes.
"""

from __future__ import annotations

import io
import pickle
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from limbeck.data.samples import Data, Samples
from limbeck.data.sources import data_folder
from limbeck.data.streams import Stream
from limbeck.errors import UserError

NO_LABEL = -100  # what cross_entropy ignores
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True, kw_only=True)
class Graph(Data):
    """One graph for node classification.

    Every split holds nodes (`features` float32 [F], `label`, `index` = number of the node); `test` also holds
    `hidden`. Nothing is hidden in the transductive setting: features and edges of all nodes are seen in training, the
    labels of `train` alone. In the inductive one a part of the test nodes and all of their edges are hidden.

    Attributes:
        nodes: all N nodes, in the order of their numbers.
        edge_index: int64 [2, E], each undirected edge in both directions, no self loops, no duplicates.
        hidden: bool [N].
    """

    nodes: Samples
    edge_index: Tensor
    hidden: Tensor

    @property
    def observed(self) -> Samples:
        """The nodes that are seen in training: `features`, and `train_label` (-100 where the label isn't known)."""
        known_N = torch.full((len(self.nodes),), NO_LABEL)
        known_N[self.train.index] = self.train.labels
        nodes = self.nodes.without("label").with_fields({"train_label": known_N})
        return nodes.select((~self.hidden).nonzero().flatten())

    @property
    def observed_edges(self) -> Tensor:
        """int64 [2, E']: the edges between observed nodes, which are numbered by their rows in `observed`."""
        return subgraph(self.edge_index, ~self.hidden)


def load_graph(
    name_or_path: str | Path | Mapping[str, Any],
    *,
    split: Literal["cpf", "given"] = "cpf",
    train_per_class: int = 20,
    validation_per_class: int = 30,
    setting: Literal["transductive", "inductive"] = "transductive",
    hidden_fraction: float = 0.2,
    largest_component: bool = False,
    normalize_features: bool = False,
    split_seed: int | None = None,
    seed: int = 0,
) -> Graph:
    """The graph of this name, path or content.

    - a folder in Planetoid's layout (`ind.<name>.x`, `.tx`, `.allx`, `.graph`, ..., or a folder `raw` of them). The
      files are pickles: they are read by a reader that builds arrays and lists and refuses everything else.
    - an `.npz` file in the layout of CPF (`adj_data`, `adj_indices`, `adj_indptr`, `adj_shape`, `attr_*` or
      `attr_matrix`, `labels`), or with the keys of the mapping below.
    - a mapping with `features` [N, F], `edge_index` [2, E], `label` [N] and, for `split="given"`, the node numbers
      `train`, `validation` and `test`.
    - a name: a folder or `.npz` of that name in `LIMBECK_DATA`.

    Args:
        split: `cpf` draws `train_per_class` and `validation_per_class` nodes of each class, the rest is test
            (Yang et al. 2021); `given` takes the splits that come with the graph (Planetoid's public ones).
        setting: `inductive` hides `hidden_fraction` of the test nodes, with their edges.
        largest_component: keep only the largest connected component, as CPF does; nodes are numbered anew.
        normalize_features: divide each node's features by their sum.
        split_seed: of the split; by default the run's seed.

    Raises:
        UserError: nothing is there, an edge names a node that does not exist, rows do not fit, or a class has too few
            nodes for its split.
    """
    found = dict(name_or_path) if isinstance(name_or_path, Mapping) else _read(Path(name_or_path))
    name = "graph" if isinstance(name_or_path, Mapping) else Path(name_or_path).stem
    features_NF, label_N = _node_columns(found)
    edge_index = undirected(torch.as_tensor(found["edge_index"]), len(features_NF))
    if largest_component:
        if split == "given":
            raise UserError("largest_component numbers the nodes anew, so the given split has no meaning; use cpf")
        kept_N = _largest_component(edge_index, len(features_NF))
        features_NF, label_N, edge_index = features_NF[kept_N], label_N[kept_N], subgraph(edge_index, kept_N)
    if normalize_features:
        features_NF = features_NF / features_NF.sum(1, keepdim=True).clamp(min=1e-12)
    classes = found.get("classes")
    nodes = Samples({"features": features_NF, "label": label_N}, None if classes is None else [str(c) for c in classes])
    generator = torch.Generator().manual_seed(seed if split_seed is None else split_seed)
    if split == "given":
        rows = _given_split(found, len(nodes))
    else:
        rows = _cpf_split(nodes, train_per_class, validation_per_class, generator)
    hidden_N = torch.zeros(len(nodes), dtype=torch.bool)
    if setting == "inductive":
        if not 0 < hidden_fraction < 1:
            raise UserError(f"hidden_fraction is {hidden_fraction}; give a share of the test nodes between 0 and 1")
        test = rows["test"]
        order = torch.randperm(len(test), generator=generator)
        hidden_N[test[order[: max(1, round(hidden_fraction * len(test)))]]] = True
    return Graph(
        train=nodes.select(rows["train"]),
        validation=nodes.select(rows["validation"]),
        test=nodes.with_fields({"hidden": hidden_N}).select(rows["test"]),
        unlabelled=nodes.without("label").select((~hidden_N).nonzero().flatten()),
        name=name,
        nodes=nodes,
        edge_index=edge_index,
        hidden=hidden_N,
    )


def full_batch(nodes: Samples) -> Stream:
    """All nodes in their order at every step, for networks that read a graph; each process gets all of them."""
    return Stream(nodes, len(nodes), shuffle=False, cycle=True, view_field="features")


def undirected(edge_index: Tensor, nodes: int) -> Tensor:
    """int64 [2, E]: every edge in both directions, without self loops and duplicates, sorted.

    Raises:
        UserError: it is no [2, E] of whole numbers, or an edge names a node outside 0..N-1.
    """
    if edge_index.dim() != 2 or edge_index.shape[0] != 2 or edge_index.is_floating_point():
        kind = str(edge_index.dtype).removeprefix("torch.")
        raise UserError(f"edge_index is {kind} {list(edge_index.shape)}; give int64 [2, edges], two nodes an edge")
    edge_index = edge_index.long()
    outside = ((edge_index < 0) | (edge_index >= nodes)).any(0).nonzero().flatten()
    if len(outside):
        first, second = edge_index[:, outside[0]].tolist()
        raise UserError(
            f"edge {int(outside[0])} joins the nodes {first} and {second}, but there are {nodes} nodes (0 to "
            f"{nodes - 1}); give every node a row of features, or leave the edge out"
        )
    source, target = edge_index
    between = source != target
    source, target = source[between], target[between]
    keys = torch.unique(torch.cat([source * nodes + target, target * nodes + source]))
    return torch.stack([keys // nodes, keys % nodes])


def subgraph(edge_index: Tensor, kept_N: Tensor) -> Tensor:
    """int64 [2, E']: the edges between the nodes of a mask, which are numbered anew in their order."""
    number_N = kept_N.cumsum(0) - 1
    return number_N[edge_index[:, kept_N[edge_index].all(0)]]


def _node_columns(found: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """float32 [N, F] and int64 [N], once they fit each other."""
    for key in ("features", "edge_index", "label"):
        if key not in found:
            raise UserError(f"a graph needs features, edge_index and label; got {', '.join(found)}")
    features_NF = torch.as_tensor(found["features"]).float()
    label_N = torch.as_tensor(found["label"]).long()
    if features_NF.dim() != 2 or label_N.shape != features_NF.shape[:1]:
        raise UserError(
            f"features are {list(features_NF.shape)} and labels {list(label_N.shape)}; "
            "give [nodes, features] and [nodes]"
        )
    return features_NF, label_N


# ---------------------------------------------------------------- splits


def _given_split(found: Mapping[str, Any], nodes: int) -> dict[str, Tensor]:
    missing = [name for name in SPLITS if name not in found]
    if missing:
        raise UserError(f"the graph comes without the split '{missing[0]}'; give its node numbers, or use split=cpf")
    rows = {name: torch.as_tensor(found[name]).long() for name in SPLITS}
    together = torch.cat(list(rows.values()))
    if len(together.unique()) != len(together) or int(together.min()) < 0 or int(together.max()) >= nodes:
        raise UserError(f"the given splits share a node, or name one outside 0 to {nodes - 1}; give each node once")
    return rows


def _cpf_split(nodes: Samples, train: int, validation: int, generator: torch.Generator) -> dict[str, Tensor]:
    order = torch.randperm(len(nodes), generator=generator)
    rows: dict[str, list[Tensor]] = {name: [] for name in SPLITS}
    for number in range(nodes.num_classes):
        of_class = order[nodes.labels[order] == number]
        if len(of_class) <= train + validation:
            raise UserError(
                f"class {number} has {len(of_class)} nodes, and {train} for training and {validation} for validation "
                "leave none for the test; lower train_per_class or validation_per_class"
            )
        for name, part in zip(SPLITS, of_class.tensor_split([train, train + validation]), strict=True):
            rows[name].append(part)
    return {name: torch.cat(parts).sort().values for name, parts in rows.items()}


def _largest_component(edge_index: Tensor, nodes: int) -> Tensor:
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    links = coo_matrix((np.ones(edge_index.shape[1]), tuple(edge_index.numpy())), shape=(nodes, nodes))
    component_N = torch.from_numpy(connected_components(links, directed=False)[1]).long()
    return component_N == component_N.bincount().argmax()


# ---------------------------------------------------------------- files


def _read(path: Path) -> dict[str, Any]:
    here = data_folder()
    for place in (path, path.with_name(path.name + ".npz"), here / path, here / f"{path}.npz"):
        if place.is_file() and place.suffix == ".npz":
            return _read_npz(place)
        for folder in (place, place / "raw"):
            if files := sorted(folder.glob("ind.*.graph")):
                return _read_planetoid(folder, files[0].name.split(".")[1])
    raise UserError(
        f"there is no graph '{path}': looked for a folder in Planetoid's layout or an .npz there and below {here.name}"
    )


def _read_npz(file: Path) -> dict[str, Any]:
    from scipy.sparse import csr_matrix

    with np.load(file, allow_pickle=False) as arrays:
        found = dict(arrays)
    if "adj_data" not in found:
        return found

    def sparse(prefix: str) -> Any:
        parts = (found[f"{prefix}_data"], found[f"{prefix}_indices"], found[f"{prefix}_indptr"])
        return csr_matrix(parts, shape=found[f"{prefix}_shape"])

    features = sparse("attr").toarray() if "attr_data" in found else found["attr_matrix"]
    edges = np.stack(sparse("adj").nonzero()).astype(np.int64)
    return {"features": features, "edge_index": edges, "label": found["labels"]}


def _read_planetoid(folder: Path, name: str) -> dict[str, Any]:
    """Nodes are numbered `allx` first; row i of `tx` is node `test.index[i]`. Test nodes that are missing (Citeseer has
    15 isolated ones) have zero features and belong to no split."""
    x, allx, ally, tx, ty, neighbours = (
        _unpickle(folder / f"ind.{name}.{part}") for part in ("x", "allx", "ally", "tx", "ty", "graph")
    )
    test = np.loadtxt(folder / f"ind.{name}.test.index", dtype=np.int64)
    size = max(int(test.max()) + 1, allx.shape[0])
    features, labels = np.zeros((size, allx.shape[1]), np.float32), np.zeros((size, ally.shape[1]))
    features[: allx.shape[0]], labels[: allx.shape[0]] = allx.toarray(), ally
    features[test], labels[test] = tx.toarray(), ty
    pairs = [(node, other) for node, others in neighbours.items() for other in others]
    return {
        "features": features,
        "edge_index": np.array(pairs, dtype=np.int64).T,
        "label": labels.argmax(1),
        "train": np.arange(x.shape[0]),
        "validation": np.arange(x.shape[0], min(x.shape[0] + 500, allx.shape[0])),
        "test": np.sort(test),
    }


class _ArraysOnly(pickle.Unpickler):
    """Reads NumPy arrays, SciPy's sparse rows, lists and dicts; a file that names anything else is refused."""

    def find_class(self, module: str, name: str) -> Any:
        from numpy._core.multiarray import _reconstruct
        from scipy.sparse import csr_matrix

        allowed = {
            "_reconstruct": _reconstruct,
            "ndarray": np.ndarray,
            "dtype": np.dtype,
            "csr_matrix": csr_matrix,
            "defaultdict": defaultdict,
            "list": list,
        }
        if name not in allowed or module.split(".")[0] not in ("numpy", "scipy", "collections", "__builtin__"):
            raise UserError(f"the file asks for {module}.{name}, which no graph needs; do not trust it")
        return allowed[name]


def _unpickle(file: Path) -> Any:
    if not file.is_file():
        raise UserError(f"Planetoid's layout needs the file {file.name}, which is not in {file.parent.name}")
    return _ArraysOnly(io.BytesIO(file.read_bytes()), encoding="latin1").load()
