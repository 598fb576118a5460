"""POST /api/v1/machine/keepalive as one would write it in an afternoon: Flask, SQLite, gunicorn.

What fleet_processes.py compares the embedded gateway with.  The same database, the same token check, the
same UPDATE; the body is taken as it comes, where the embedded gateway checks each type.  DB names the file.
"""
import hashlib
import json
import os
import sqlite3
import time

from flask import Flask, g, jsonify, request

app = Flask(__name__)


def database():
    if "database" not in g:
        g.database = sqlite3.connect(os.environ["DB"], timeout=5.0, isolation_level=None)
        g.database.execute("PRAGMA synchronous=NORMAL")
    return g.database


@app.teardown_appcontext
def close(_error):
    connection = g.pop("database", None)
    if connection is not None:
        connection.close()


@app.post("/api/v1/machine/keepalive")
def keepalive():
    token = request.headers.get("Authorization", "")[len("Bearer "):]
    row = database().execute("SELECT machine_id FROM machines WHERE token_sha256 = ?",
                             (hashlib.sha256(token.encode()).hexdigest(),)).fetchone()
    fields, now = request.get_json(), time.time()
    if row is None or row[0] != fields["machine_id"]:
        return jsonify(message="Unauthorized"), 401
    changed = database().execute(
        "UPDATE machines SET state = 'ready', last_keepalive = ?, expires_at = ?, metrics = ? "
        "WHERE machine_id = ? AND pool_name = ? AND expires_at > ?",
        (now, now + 300, json.dumps(fields["metrics"]), row[0], fields["pool_name"], now)).rowcount
    if not changed:
        return jsonify(message="machine not found"), 500
    return jsonify(status="ok", machine_state={"machine_id": row[0], "status": "ready"})
