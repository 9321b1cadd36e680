"""The KFP face of fetch."""

from kfp import dsl

from trimtab.components import images


@dsl.component(base_image=images.CPU, install_kfp_package=False)
def fetch(model: str, store: str, source: dsl.Output[dsl.Model]) -> str:
    """Brings the model into the store; a model that is there already is found by its content.

    Args:
        model: A folder, a .gguf file, s3://bucket/prefix, a tree of the store, or a hub id.
        store: URI of the store.
        source: Names the model's tree.

    Returns:
        The model's tree, JSON.
    """
    from trimtab import stages
    from trimtab.base import child, transient
    from trimtab.components.fetch.source import fetch
    from trimtab.store import open_store

    child.follow_run()
    tree = transient.insist("fetch", lambda: fetch(model, open_store(store)))
    stages.describe_tree(source, tree)
    return tree.to_json()
