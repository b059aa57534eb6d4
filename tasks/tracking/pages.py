"""MLflow's pages for a data directory."""

from pathlib import Path

from tasks.tracking.speaking import is_server, speaking, tracking_uri


def pages_command(home: Path) -> tuple[list[str], dict[str, str]] | None:
    """What serves MLflow's pages on the loopback, from one process; its port is to be added.

    Runs write to the same database on their own, so tracking does not depend on the pages.

    Args:
        home: The data directory; its database is made where there is none.

    Returns:
        The module with its arguments, and its environment, since a database's address may hold a
        password and arguments are seen by everybody. None where `MLFLOW_TRACKING_URI` names a
        server, which has pages of its own.

    Raises:
        TrackingError: The database cannot be opened.
    """
    uri = tracking_uri(home)
    if is_server(uri):
        return None
    with speaking(home, "to show its pages"):
        pass
    environment = {
        "MLFLOW_BACKEND_STORE_URI": uri,
        "MLFLOW_DEFAULT_ARTIFACT_ROOT": (home.resolve() / "mlartifacts").as_uri(),
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    return ["mlflow", "server", "--host", "127.0.0.1", "--workers", "1"], environment
