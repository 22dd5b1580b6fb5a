"""Object stores for the tests, and what stands in front of them: an S3 gateway, Azurite, relays, and the stand-in service.
SPDX-License-Identifier: MIT"""
import base64
import datetime
import hashlib
import json
import pathlib
import random
import re
import socket
import subprocess
import threading
import time
import traceback
import urllib.parse

import azure.storage.blob
import boto3
import botocore.client
import trustme

MIB = 1 << 20
PART = 8 * MIB  # of a multipart upload
SECRET = "secret-of-the-store"
BUCKET = "models"


def md5(content):
    return base64.b64encode(hashlib.md5(content).digest()).decode()


def content(size, seed=0):
    return random.Random(seed).randbytes(size)


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def wait_for_port(process, port, log):
    for _ in range(600):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        if process.poll() is not None:
            break
        time.sleep(0.05)
    raise SystemExit(f"{process.args[0]} does not start: {log.read_text()}")


class Certificates:
    """A certificate for 127.0.0.1 and its authority."""

    def __init__(self, folder):
        authority = trustme.CA()
        made = authority.issue_cert("127.0.0.1")
        self.authority, self.certificate, self.key = folder / "ca.pem", folder / "server.pem", folder / "server.key"
        authority.cert_pem.write_to_path(self.authority)
        made.private_key_pem.write_to_path(self.key)
        for one in made.cert_chain_pems:
            one.write_to_path(self.certificate, append=True)


class Program:
    """A server program that listens on a port of its own."""

    def start(self, folder, command, port):
        log = folder / (pathlib.Path(command[0]).name + f"-{port}.log")
        with log.open("wb") as out:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, cwd=folder)
        wait_for_port(self.process, port, log)

    def stop(self):
        self.process.terminate()
        self.process.wait()


class S3(Program):
    """versitygw over a folder."""
    missing, forbidden = "NoSuchKey", "SignatureDoesNotMatch"

    def __init__(self, tools, folder, certificates):
        self.title = "s3, https" if certificates else "s3, http"
        self.certificates, self.port = certificates, free_port()
        top, beside = folder / f"s3-{self.port}", folder / f"metadata-{self.port}"
        top.mkdir()
        beside.mkdir()  # not every file system has extended attributes
        tls = ["--cert", certificates.certificate, "--key", certificates.key, "--keep-alive"] if certificates else []
        self.start(folder, [tools / "versitygw", "--port", f"127.0.0.1:{self.port}", "--access", "tests", "--secret", SECRET, "--quiet",
            *tls, "posix", "--sidecar", beside, top], self.port)
        self.client = self.client_at(self.port)
        self.signers = {(self.port, SECRET): self.client}
        self.client.create_bucket(Bucket=BUCKET)

    def client_at(self, port, secret=SECRET, checksums="when_required"):
        """`checksums`: the default, "when_supported", sends aws-chunked uploads over https."""
        return boto3.client("s3", endpoint_url=f"{'https' if self.certificates else 'http'}://127.0.0.1:{port}",
            aws_access_key_id="tests", aws_secret_access_key=secret, region_name="us-east-1",
            verify=str(self.certificates.authority) if self.certificates else None,
            config=botocore.client.Config(signature_version="s3v4", s3={"addressing_style": "path"}, request_checksum_calculation=checksums))

    def put(self, key, data, parts=False, **headers):
        """Uploads an object. `parts`: in parts, after which the entity tag is no md5."""
        names = {"content_type": "ContentType", "content_encoding": "ContentEncoding", "content_disposition": "ContentDisposition",
            "cache_control": "CacheControl"}
        headers = {names[name]: value for name, value in headers.items()}
        if not parts:
            self.client.put_object(Bucket=BUCKET, Key=key, Body=data, **headers)
            return
        upload = self.client.create_multipart_upload(Bucket=BUCKET, Key=key, **headers)["UploadId"]
        done = []
        for number, begin in enumerate(range(0, len(data), PART), 1):
            tag = self.client.upload_part(Bucket=BUCKET, Key=key, UploadId=upload, PartNumber=number, Body=data[begin:begin + PART])["ETag"]
            done.append({"ETag": tag, "PartNumber": number})
        self.client.complete_multipart_upload(Bucket=BUCKET, Key=key, UploadId=upload, MultipartUpload={"Parts": done})

    def put_chunked(self, key, data):
        """Uploads with the coding aws-chunked, which some stores take for a property of the object."""
        self.client_at(self.port, checksums="when_supported").put_object(Bucket=BUCKET, Key=key, Body=data)

    def etag(self, key):
        return self.client.head_object(Bucket=BUCKET, Key=key)["ETag"].strip('"')

    def remove(self, key):
        self.client.delete_object(Bucket=BUCKET, Key=key)

    def address(self, key, seconds=3600, port=None, secret=SECRET, bucket=BUCKET):
        """Returns an address that is signed now, and is good for so many seconds."""
        signer = (port or self.port, secret)
        if signer not in self.signers:  # a new client takes a tenth of a second
            self.signers[signer] = self.client_at(*signer)
        return self.signers[signer].generate_presigned_url("get_object", Params={"Bucket": bucket, "Key": key}, ExpiresIn=seconds)

    def expired_address(self, key):
        address = self.address(key, seconds=1)
        signed = datetime.datetime.strptime(re.search(r"X-Amz-Date=(\w+)", address)[1], "%Y%m%dT%H%M%SZ")
        wait_until(signed.replace(tzinfo=datetime.timezone.utc).timestamp() + 2)
        return address


class Azure(Program):
    """Azurite, and shared access signatures."""
    account, key = "devstoreaccount1", base64.b64encode(SECRET.encode()).decode()
    missing, forbidden = "BlobNotFound", "AuthorizationFailure"

    def __init__(self, tools, folder, certificates):
        self.title = "azure, https" if certificates else "azure, http"
        self.certificates, self.port = certificates, free_port()
        tls = ["--cert", certificates.certificate, "--key", certificates.key] if certificates else []
        top = folder / f"azure-{self.port}"
        top.mkdir()
        self.start(folder, ["env", f"AZURITE_ACCOUNTS={self.account}:{self.key}", tools / "azurite-blob", "--blobPort", str(self.port),
            "--location", top, "--silent", "--disableTelemetry", "--skipApiVersionCheck", *tls], self.port)
        scheme = "https" if certificates else "http"
        self.base = f"{scheme}://127.0.0.1:%d/{self.account}"
        self.clients = {parts: azure.storage.blob.BlobServiceClient(self.base % self.port, credential=self.key,
            max_single_put_size=PART if parts else 1 << 30, max_block_size=PART,
            **({"connection_verify": str(certificates.authority)} if certificates else {})).get_container_client(BUCKET)
                        for parts in (False, True)}
        self.clients[False].create_container()

    def put(self, key, data, parts=False, **headers):
        settings = azure.storage.blob.ContentSettings(**headers)
        self.clients[parts].upload_blob(key, data, overwrite=True, content_settings=settings)

    def etag(self, key):
        return self.clients[False].get_blob_client(key).get_blob_properties().etag.strip('"')

    def remove(self, key):
        self.clients[False].delete_blob(key)

    def address(self, key, seconds=3600, port=None, secret=None, bucket=BUCKET):
        expiry = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(seconds=seconds)
        account_key = base64.b64encode(secret.encode()).decode() if secret else self.key
        token = azure.storage.blob.generate_blob_sas(self.account, bucket, key, account_key=account_key, permission="r", expiry=expiry)
        return f"{self.base % (port or self.port)}/{bucket}/{urllib.parse.quote(key, safe='/~')}?{token}"

    def expired_address(self, key):
        return self.address(key, seconds=-60)


def wait_until(moment):
    while time.time() < moment:
        time.sleep(0.05)


class Relay:
    """A port that leads to a store, and that can be slow, late, cut or closed. Counts what it sends to the clients."""

    def __init__(self, port):
        self.store, self.port = port, free_port()
        self.rate = None  # bytes per second of each connection
        self.late = 0  # seconds that requests wait here
        self.cut_after = None  # bytes that each connection brings
        self.sent, self.lock, self.sockets, self.listener = 0, threading.Lock(), set(), None
        self.enable(True)

    def enable(self, yes):
        """False: closes every connection, and refuses new ones."""
        with self.lock:
            if self.listener:
                self.listener.shutdown(socket.SHUT_RDWR)
                self.listener.close()
            for one in self.sockets:
                abort(one)
            self.sockets.clear()
            self.listener = socket.create_server(("127.0.0.1", self.port), backlog=100) if yes else None
            if yes:
                threading.Thread(target=self.accept, args=[self.listener], daemon=True).start()

    def accept(self, listener):
        while True:
            try:
                client = listener.accept()[0]
            except OSError:  # closed
                return
            store = socket.create_connection(("127.0.0.1", self.store))
            with self.lock:
                if self.listener is not listener:
                    abort(client)
                self.sockets |= {client, store}
            for one in (client, store):
                one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=self.forward, args=[client, store], daemon=True).start()
            threading.Thread(target=self.deliver, args=[store, client], daemon=True).start()

    def forward(self, client, store):
        try:
            while some := client.recv(65536):
                time.sleep(self.late)
                store.sendall(some)
        except OSError:
            pass
        abort(store)

    def deliver(self, store, client):
        brought, due = 0, time.monotonic()
        try:
            while some := store.recv(16384 if self.rate else 262144):
                if self.rate:
                    due = max(due, time.monotonic() - 0.1) + len(some) / self.rate
                    time.sleep(max(0, due - time.monotonic()))
                if self.cut_after:
                    some = some[:self.cut_after - brought]
                client.sendall(some)
                brought += len(some)
                with self.lock:
                    self.sent += len(some)
                if brought == self.cut_after:
                    break
        except OSError:
            pass
        abort(client)

    def close(self):
        self.enable(False)


def abort(one):
    """Ends a connection for both of its threads."""
    try:
        one.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass
    one.close()


class Service:
    """The stand-in for the service. Asks `addresses[run](name)` for the address of each redirect."""

    def __init__(self, program, tls, more=()):
        command = [program, "--run", "stores/tests/first", "--control", *([] if tls else ["--plain"]), *more]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.addresses, self.says, self.writing, self.done = {}, {}, threading.Lock(), threading.Semaphore(0)
        for line in self.process.stdout:
            if line == "ready\n":
                break
            name, _, value = line.rstrip("\n").partition("=")
            self.says[name] = value
        else:
            raise SystemExit("wandb-stand-in does not start")
        self.adding = threading.Lock()
        threading.Thread(target=self.answer, daemon=True).start()

    def say(self, what):
        with self.writing:
            print(json.dumps(what), file=self.process.stdin, flush=True)

    def answer(self):
        for line in self.process.stdout:
            asked = json.loads(line)
            if "done" in asked:
                self.done.release()
            else:
                try:
                    address = self.addresses[asked["run"]](asked["address_of"])
                except Exception as problem:  # the case fails, because no store listens there
                    traceback.print_exc()
                    address = "http://127.0.0.1:9/" + type(problem).__name__
                self.say({"address": address})

    def add(self, run, name, **node):
        with self.adding:
            self.say({"runs": {run: {"files": {name: {"text": "", **node}}}}})
            self.done.acquire()

    def stop(self):
        self.process.stdin.close()
        self.process.wait()
