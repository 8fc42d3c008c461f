#!/usr/bin/env python3
"""Opens a page of a folder in headless Chromium and waits for its verdict. It needs nothing but Python's own library.

    browser.py CHROMIUM FOLDER PAGE [--seconds N] [--expect TEXT] [--screenshot FILE.png] [--save FOLDER] [--without-webgpu]

The page tells what it does in `window.lines`, a list that grows, and ends by setting `window.verdict`, a line; `window.files` may hold
texts by name, which --save writes after every line. The exit code is 0 when the verdict starts with "ok" and has TEXT in it, and the
browser's console shows no error. PAGE is a path within FOLDER and may carry a query: `index.html?device=cpu`.
"""

import argparse
import base64
import functools
import http.server
import json
import os
import pathlib
import select
import subprocess
import sys
import tempfile
import threading
import time

# They keep the browser from calling home. SwiftShader is the software driver that Chromium brings along.
FLAGS = """--headless --no-sandbox --disable-background-networking --disable-component-update --disable-default-apps --disable-sync
--no-first-run --disable-dev-shm-usage --disable-extensions --window-size=1000,760 --remote-debugging-pipe""".split()
WEBGPU = ["--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader"]


class Pages(http.server.SimpleHTTPRequestHandler):
    """Files of the folder, with no line of log for each."""

    extensions_map = {**http.server.SimpleHTTPRequestHandler.extensions_map, ".wasm": "application/wasm", ".js": "text/javascript"}

    def log_message(self, *_):
        pass


class Browser:
    """One page of a browser, driven by the DevTools protocol: JSON between NUL bytes on the browser's descriptors 3 and 4."""

    def __init__(self, program, profile, flags, end):
        command_read, self.commands = os.pipe()
        answers, answer_write = os.pipe()

        def descriptors():
            # Out of the way first: either may be 3 or 4 already.
            ends = [os.dup(command_read), os.dup(answer_write)]
            os.dup2(ends[0], 3)
            os.dup2(ends[1], 4)

        command = [program, *flags, f"--user-data-dir={profile}", "about:blank"]
        self.log = tempfile.TemporaryFile()
        self.process = subprocess.Popen(command, preexec_fn=descriptors, close_fds=False, stderr=self.log)
        os.close(command_read)
        os.close(answer_write)
        self.answers, self.received, self.end = answers, bytearray(), end
        self.errors, self.session, self.count = [], None, 0

    def open(self):
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ["Page", "Runtime", "Log"]:
            self.call(f"{domain}.enable")

    def message(self):
        """The next one; a page that hangs answers nothing, but not beyond the end."""
        while b"\0" not in self.received:
            if not select.select([self.answers], [], [], max(0, self.end - time.monotonic()))[0]:
                raise SystemExit("browser.py: the page gave no answer in time")
            part = os.read(self.answers, 1 << 16)
            if not part:
                self.log.seek(0)
                raise SystemExit(f"browser.py: the browser ended\n{self.log.read().decode(errors='replace')[-2000:]}")
            self.received += part
        text, _, self.received = self.received.partition(b"\0")
        return json.loads(text)

    def call(self, method, **parameters):
        self.count += 1
        request = {"id": self.count, "method": method, "params": parameters}
        if self.session:
            request["sessionId"] = self.session
        os.write(self.commands, json.dumps(request).encode() + b"\0")
        while (message := self.message()).get("id") != self.count:
            self.note(message.get("method"), message.get("params"))
        if "error" in message:
            raise SystemExit(f"browser.py: {method}: {message['error']}")
        return message["result"]

    def note(self, method, event):
        """Keeps what a person would see in red on the console."""
        if method == "Runtime.exceptionThrown":
            self.errors.append(event["exceptionDetails"].get("exception", {}).get("description", event["exceptionDetails"]["text"]))
        elif method == "Runtime.consoleAPICalled" and event["type"] in ("error", "assert"):
            self.errors.append(" ".join(str(word.get("value", word.get("description"))) for word in event["args"]))
        elif method == "Log.entryAdded" and event["entry"]["level"] == "error":
            self.errors.append(f"{event['entry']['text']} {event['entry'].get('url', '')}")

    def value(self, script):
        outcome = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        return outcome["result"].get("value")

    def close(self):
        self.process.kill()
        self.process.wait()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1800, help="to wait for the verdict")
    parser.add_argument("--expect", default="", help="text that the verdict must have in it")
    parser.add_argument("--screenshot", type=pathlib.Path)
    parser.add_argument("--save", type=pathlib.Path)
    parser.add_argument("--without-webgpu", action="store_true", help="the browser finds no adapter")
    for name in ["browser", "folder", "page"]:
        parser.add_argument(name)
    arguments = parser.parse_args()

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Pages, directory=arguments.folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        end = time.monotonic() + arguments.seconds
        browser = Browser(arguments.browser, profile, FLAGS + ([] if arguments.without_webgpu else WEBGPU), end)
        try:
            browser.open()
            browser.call("Page.navigate", url=f"http://127.0.0.1:{server.server_port}/{arguments.page}")
            verdict, printed = None, 0
            while verdict is None and not browser.errors and time.monotonic() < end:
                time.sleep(0.2)
                # The verdict first: no line comes after it.
                verdict = browser.value("window.verdict ?? null")
                lines = browser.value(f"(window.lines ?? []).slice({printed})") or []
                printed += len(lines)
                print(*lines, sep="\n", end="\n" if lines else "", flush=True)
                if lines and arguments.save:
                    for name, text in browser.value("window.files ?? {}").items():
                        (arguments.save / name).write_text(text)
            if arguments.screenshot:
                arguments.screenshot.write_bytes(base64.b64decode(browser.call("Page.captureScreenshot")["data"]))
        finally:
            browser.close()
    for message in browser.errors:
        print("console:", message)
    print(verdict or "failed: no verdict")
    is_fine = verdict and verdict.startswith("ok") and arguments.expect in verdict and not browser.errors
    sys.exit(0 if is_fine else 1)


if __name__ == "__main__":
    main()
