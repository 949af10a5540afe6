"""An HTTP server in this process that answers as a test wants, where a real vLLM can't be made to fail."""

import http.server
import json
import threading
from contextlib import contextmanager, suppress


@contextmanager
def fake_server(answer):
    """A server whose POST answer is answer(path, body) -> (status, JSON); None drops the connection."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            reply = answer(self.path, json.loads(body) if body else None)
            if reply is None:
                self.connection.close()
                return
            data = json.dumps(reply[1]).encode()
            with suppress(ConnectionError):  # a client that timed out does not wait for it
                self.send_response(reply[0])
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
