"""What an S3 endpoint says when something is wrong, as one sentence that tells what to do."""

from __future__ import annotations

from trimtab.base.errors import InputError, StoreError, TrimtabError, Unreachable

#: Error codes whose cause is in the address or the credentials → what to do. Sources: the "Error responses"
#: page of the Amazon S3 API reference; MinIO's and SeaweedFS's lists carry the same names.
REMEDIES = {
    "InvalidAccessKeyId": "AWS_ACCESS_KEY_ID is not known there: correct it",
    "SignatureDoesNotMatch": "AWS_SECRET_ACCESS_KEY does not belong to AWS_ACCESS_KEY_ID: correct it",
    "ExpiredToken": "the credentials have expired: get new ones with a new AWS_SESSION_TOKEN",
    "InvalidToken": "AWS_SESSION_TOKEN is not valid: get new credentials or unset it",
    "InvalidTokenId": "AWS_SESSION_TOKEN is not valid: get new credentials or unset it",
    "AccessDenied": "the credentials do not allow it: grant s3:ListBucket, s3:GetObject, s3:PutObject and "
    "s3:DeleteObject on bucket '{bucket}', or correct AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "NoSuchBucket": "the bucket '{bucket}' does not exist: create it or correct the store's address",
    "AuthorizationHeaderMalformed": "the bucket is in another region: set AWS_REGION",
    "PermanentRedirect": "the bucket is in another region: set AWS_REGION",
    "Redirect": "the bucket is in another region: set AWS_REGION",
    "RequestTimeTooSkewed": "the clock of this machine is wrong: set it",
}

FULL = ("XMinioStorageFull", "InsufficientStorage", "InsufficientCapacity", "QuotaExceeded", "HTTP 507")

#: What another try may change.
PASSING = ("InternalError", "ServiceUnavailable", "SlowDown", "RequestTimeout") + tuple(
    f"HTTP {status}" for status in (500, 502, 503, 504)
)


def explain_code(code: str, message: str, what: str, endpoint: str, bucket: str) -> TrimtabError:
    """Returns the error for an answer's code; `what` is what was tried ("read trees/….json")."""
    if code in REMEDIES:
        return InputError(f"cannot {what} at {endpoint}: {REMEDIES[code].format(bucket=bucket)}")
    if code in FULL:
        return StoreError(f"cannot {what} at {endpoint}: no space left ({code}): free some and run again")
    detail = f"{code}: {message}" if message else code
    kind = Unreachable if code in PASSING else StoreError
    return kind(f"cannot {what} at {endpoint}: it answered {detail}; run it again")


def explain_connection(error: Exception, what: str, endpoint: str) -> Unreachable:
    """Returns the error for a request that got no answer. Never quotes the client's text, which may hold a
    signed address."""
    from urllib3 import exceptions

    reason = getattr(error, "reason", None) or error
    if isinstance(reason, exceptions.NameResolutionError):
        problem = "its host name is not known: correct AWS_ENDPOINT_URL"
    elif isinstance(reason, exceptions.NewConnectionError):
        problem = "it refuses the connection: start it or correct AWS_ENDPOINT_URL"
    elif isinstance(reason, exceptions.TimeoutError):
        problem = "it does not answer in time: start it, or correct AWS_ENDPOINT_URL"
    elif isinstance(reason, exceptions.SSLError):
        problem = "its TLS certificate is not trusted: set SSL_CERT_FILE, or write http:// if it has no TLS"
    else:
        problem = f"the connection broke ({type(reason).__name__}): run it again"
    return Unreachable(f"cannot {what} at {endpoint}: {problem}")
