#!/usr/bin/env bash
# Runs a command with Prefect and MLflow on PostgreSQL, by environment variables alone:
#
#     deployments/with-postgres.sh eigenpress up
#
# It starts a PostgreSQL of its own on the loopback (Debian: apt-get install postgresql; Python:
# pip install 'eigenpress[postgres]') and stops it when the command ends. Its data is temporary, or in
# the folder EIGENPRESS_POSTGRES and there again the next time. To use a server that you have, set the
# two variables of the last lines yourself.
set -euo pipefail

[ $# -gt 0 ] || { echo "usage: $0 COMMAND [ARGUMENT]..." >&2; exit 2; }
bin=$(ls -d /usr/lib/postgresql/*/bin 2>/dev/null | sort -V | tail -1)
[ -n "$bin" ] || bin=$(dirname "$(command -v initdb || true)")
[ -x "$bin/initdb" ] || { echo "$0: no PostgreSQL here (Debian: apt-get install postgresql)" >&2; exit 2; }

# PostgreSQL refuses to run as root; the user that Debian's package makes does it then.
as_server() { "$@"; }
if [ "$(id -u)" = 0 ]; then
    as_server() { runuser -u postgres -- "$@"; }
fi

place=${EIGENPRESS_POSTGRES:-$(mktemp -d)}
mkdir -p "$place"
data=$place/data password_file=$place/password
stop() {
    [ ! -f "$data/postmaster.pid" ] || as_server "$bin/pg_ctl" -D "$data" -m fast -w stop >/dev/null || true
    [ -n "${EIGENPRESS_POSTGRES:-}" ] || rm -rf "$place"
}
trap stop EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

# A password, because every user of this machine can reach the loopback.
if [ ! -f "$password_file" ]; then
    (umask 077; od -An -tx1 -N16 /dev/urandom | tr -d ' \n' >"$password_file")
fi
[ "$(id -u)" != 0 ] || chown -R postgres "$place"
password=$(cat "$password_file")
if [ ! -f "$data/PG_VERSION" ]; then
    as_server "$bin/initdb" -D "$data" -U eigenpress --auth=scram-sha-256 --pwfile="$password_file" \
        --encoding=UTF8 --locale=C.UTF-8 >/dev/null
fi
port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
as_server "$bin/pg_ctl" -D "$data" -w -l "$place/postgres.log" \
    -o "-c listen_addresses=127.0.0.1 -c port=$port -c unix_socket_directories=$place" start >/dev/null || {
    echo "$0: PostgreSQL did not start: $(tail -1 "$place/postgres.log")" >&2
    exit 1
}
for database in prefect mlflow; do
    there=$(PGPASSWORD=$password "$bin/psql" -h 127.0.0.1 -p "$port" -U eigenpress -d postgres -tAc \
        "SELECT 1 FROM pg_database WHERE datname = '$database'")
    [ "$there" = 1 ] || PGPASSWORD=$password "$bin/createdb" -h 127.0.0.1 -p "$port" -U eigenpress "$database"
done

export PREFECT_SERVER_DATABASE_CONNECTION_URL="postgresql+asyncpg://eigenpress:$password@127.0.0.1:$port/prefect"
export MLFLOW_TRACKING_URI="postgresql+psycopg2://eigenpress:$password@127.0.0.1:$port/mlflow"
"$@" &
command=$!
trap 'kill -INT $command 2>/dev/null || true' INT
trap 'kill -TERM $command 2>/dev/null || true' TERM HUP
code=0
wait $command || code=$?
while kill -0 $command 2>/dev/null; do # a signal ends `wait` before the command has ended
    code=0
    wait $command || code=$?
done
exit $code
