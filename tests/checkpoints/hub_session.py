"""Run as a program: loads hub names from a small hub on this machine, and prints what came of it as JSON lines.

A process of its own, because the hub's library reads its settings when it is imported.
Arguments: the directory that the hub serves as owner/model.
"""

import hashlib
import json
import os
import sys
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "a" * 40
REPOSITORIES = {"owner/model": Path(sys.argv[1]), "owner/empty": None}
requests: list[str] = []
is_down = threading.Event()


class Hub(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self) -> tuple[int, dict[str, str], bytes]:
        for name, directory in REPOSITORIES.items():
            files = (
                {path.name: path.read_bytes() for path in directory.iterdir()} if directory else {"README.md": b"hi"}
            )
            if self.path.startswith(f"/api/models/{name}/tree/"):
                entries = [
                    {"type": "file", "path": key, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                    for key, content in files.items()
                ]
                return 200, {"Content-Type": "application/json"}, json.dumps(entries).encode()
            if self.path.startswith(f"/api/models/{name}/"):
                about = {"id": name, "sha": COMMIT, "siblings": [{"rfilename": key} for key in files]}
                return 200, {"Content-Type": "application/json"}, json.dumps(about).encode()
            if self.path.startswith(f"/{name}/resolve/"):
                content = files[self.path.rpartition("/")[2]]
                etag = hashlib.sha1(content).hexdigest()
                return 200, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}, content
        code = "GatedRepo" if "/gated/" in self.path else "RepoNotFound"
        return (403 if code == "GatedRepo" else 404), {"X-Error-Code": code}, b""

    def do_HEAD(self) -> None:
        if is_down.is_set():
            self.close_connection = True
            return
        requests.append(f"{self.command} {self.path}")
        status, headers, body = self.answer()
        self.send_response(status)
        for key, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_GET = do_HEAD

    def log_message(self, format: str, *args: object) -> None:
        pass


def main() -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    os.environ |= {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "no_proxy": "*"}
    os.environ |= {"HF_HOME": tempfile.mkdtemp(), "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1"}

    from proteinbert_fast.checkpoints import load_pretrained
    from proteinbert_fast.errors import CheckpointError

    for name, options in [
        ("owner/model", {"offline": True}),
        ("owner/model", {"optimizer": False}),
        ("owner/model", {}),
        ("owner/model", {"offline": True}),
        ("owner/missing", {}),
        ("gated/model", {}),
        ("owner/empty", {}),
        ("owner/model", {"cache_dir": tempfile.mkdtemp()}),
    ]:
        requests.clear()
        try:
            checkpoint = load_pretrained(name, **options)
            result = {"sha256": checkpoint.sha256, "source": checkpoint.source}
            result["optimizer"] = checkpoint.optimizer_state is not None
        except CheckpointError as error:
            result = {"error": str(error)}
        fetched = sorted(line.rpartition("/")[2] for line in requests if line.startswith("GET /owner/model/resolve"))
        print(json.dumps(result | {"fetched": fetched, "requests": len(requests)}))
    server.shutdown()
    server.server_close()
    is_down.set()
    try:
        load_pretrained("owner/other")
    except CheckpointError as error:
        print(json.dumps({"error": str(error)}))


main()
