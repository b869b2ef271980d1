"""The HTTP server of jaxpaged, installed as `jaxpaged_server`. It is not part of this version yet (see CHANGELOG.md)."""
