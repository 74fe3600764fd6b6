//! Heads: bytes in, a head and the framing of what follows out.
//!
//! Pure. Requests are read as strictly as RFC 9112 allows, since each leniency is a way to smuggle
//! one request inside another. Responses come from the application that the proxy serves, so that
//! line ends are taken as it writes them, but their framing must be as certain.

use bytes::{Buf, Bytes, BytesMut};
use http::header::{CONTENT_LENGTH, EXPECT, HOST, HeaderName, TRANSFER_ENCODING, UPGRADE};
use http::uri::{Authority, Scheme, Uri};
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, Version};

use crate::http::head::{ConnectionOptions, list, strip_hop_by_hop};

/// A request's head and what it says about its connection.
#[derive(Debug)]
pub struct RequestHead {
    /// The head, without the fields of its hop; `Upgrade` is there if the client asks for one and
    /// may get it.
    pub head: Request<()>,
    /// How its content is framed.
    pub framing: Framing,
    /// Whether the client takes another response on this connection.
    pub keep_alive: bool,
    /// Whether the client waits for 100 before it sends the content.
    pub expects_continue: bool,
    /// How many bytes the head took.
    pub consumed: usize,
}

/// A response's head and what it says about its connection.
#[derive(Debug)]
pub struct ResponseHead {
    /// The head, without the fields of its hop.
    pub head: Response<()>,
    /// How its content is framed.
    pub framing: Framing,
    /// Whether the server takes another request on this connection.
    pub keep_alive: bool,
    /// How many bytes the head took.
    pub consumed: usize,
}

/// How the content of a message is framed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Framing {
    /// In chunks.
    Chunked,
    /// By the end of the connection.
    Close,
    /// There is none.
    Empty,
    /// This many bytes.
    Length(u64),
    /// The connection becomes a tunnel.
    Tunnel,
}

/// Why a head is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)] // Each variant's text says what it is.
pub enum HeadError {
    #[error("a line ends in a bare LF; every line must end in CRLF")]
    BareLineEnd,
    #[error("CONNECT has content; a tunnel has none before it is open")]
    ContentOnConnect,
    #[error("the Host header is no host with an optional port")]
    HostInvalid,
    #[error("there is no Host header; HTTP/1.1 demands one")]
    HostMissing,
    #[error("there is more than one Host header")]
    HostRepeated,
    #[error("there are several Content-Length values, and they differ")]
    LengthConflict,
    #[error("the Content-Length is no plain decimal number below 2^64")]
    LengthInvalid,
    #[error("there are both Content-Length and Transfer-Encoding; only one can frame the content")]
    LengthWithTransferEncoding,
    #[error("the status is 101 although no upgrade was asked for")]
    SwitchUnasked,
    #[error("the head is no well-formed HTTP/1: {0}")]
    Syntax(&'static str),
    #[error("the request target is no path, absolute http URI, or host:port for CONNECT")]
    TargetInvalid,
    #[error("the request target is longer than {HEAD_BYTES_MAX} bytes")]
    TargetTooLong,
    #[error("the head is longer than {HEAD_BYTES_MAX} bytes")]
    TooLong,
    #[error("there are more than {HEADERS_MAX} header lines")]
    TooManyHeaders,
    #[error("there is a Transfer-Encoding in HTTP/1.0, which has none")]
    TransferEncodingInHttp10,
    #[error("the Transfer-Encoding does not end in a single chunked")]
    TransferEncodingInvalid,
    #[error("the Transfer-Encoding has a coding beside chunked")]
    TransferEncodingUnsupported,
    #[error("the version is neither HTTP/1.0 nor HTTP/1.1")]
    VersionUnsupported,
}

impl HeadError {
    /// The status that tells a client.
    pub fn status(self) -> StatusCode {
        match self {
            Self::TargetTooLong => StatusCode::URI_TOO_LONG,
            Self::TooLong | Self::TooManyHeaders => StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
            Self::TransferEncodingUnsupported => StatusCode::NOT_IMPLEMENTED,
            Self::VersionUnsupported => StatusCode::HTTP_VERSION_NOT_SUPPORTED,
            _ => StatusCode::BAD_REQUEST,
        }
    }
}

/// Reads a request's head; `None` when more bytes are needed.
///
/// # Errors
/// Whatever makes the head, or the framing of its content, anything but certain.
pub fn parse_request_head(bytes: &[u8]) -> Result<Option<RequestHead>, HeadError> {
    let blank = skip_blank_lines(bytes);
    let Some(end) = HeadScan::new(LineEnds::Strict).find_end(&bytes[blank..])? else {
        return Ok(None);
    };
    let mut parsed = request(&Bytes::copy_from_slice(&bytes[blank..blank + end]))?;
    parsed.consumed = blank + end;
    Ok(Some(parsed))
}

/// Reads a response's head; `None` when more bytes are needed. The request says whether content
/// follows: `upgrade` is whether it asked for one.
///
/// # Errors
/// Whatever makes the head, or the framing of its content, anything but certain.
pub fn parse_response_head(
    bytes: &[u8],
    method: &Method,
    upgrade: bool,
) -> Result<Option<ResponseHead>, HeadError> {
    let Some(end) = HeadScan::new(LineEnds::Lenient).find_end(bytes)? else { return Ok(None) };
    response(&Bytes::copy_from_slice(&bytes[..end]), method, upgrade).map(Some)
}

/// How far a head that is still coming in has been looked at, so that a client that sends it byte
/// by byte costs no more than one that does not.
#[derive(Clone, Copy, Debug)]
pub(super) struct HeadScan {
    line_ends: LineEnds,
    line_start: usize,
    scanned: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum LineEnds {
    Lenient,
    Strict,
}

impl HeadScan {
    pub(super) fn new(line_ends: LineEnds) -> Self {
        Self { line_ends, line_start: 0, scanned: 0 }
    }

    /// Takes a request's head off the front of `unread`.
    pub(super) fn take_request(
        &mut self,
        unread: &mut BytesMut,
    ) -> Result<Option<RequestHead>, HeadError> {
        // Half of an empty line may have been scanned already.
        let blank = if self.line_start == 0 { skip_blank_lines(unread) } else { 0 };
        if blank > 0 {
            unread.advance(blank);
            self.scanned = 0;
        }
        let Some(end) = self.find_end(unread)? else { return Ok(None) };
        request(&unread.split_to(end).freeze()).map(Some)
    }

    /// Takes a response's head off the front of `unread`.
    pub(super) fn take_response(
        &mut self,
        unread: &mut BytesMut,
        method: &Method,
        upgrade: bool,
    ) -> Result<Option<ResponseHead>, HeadError> {
        let Some(end) = self.find_end(unread)? else { return Ok(None) };
        response(&unread.split_to(end).freeze(), method, upgrade).map(Some)
    }

    /// Where the head that `bytes` begin with ends: behind its first empty line.
    pub(super) fn find_end(&mut self, bytes: &[u8]) -> Result<Option<usize>, HeadError> {
        while let Some(at) = bytes[self.scanned..].iter().position(|&b| b == b'\n') {
            let line_feed = self.scanned + at;
            let line = &bytes[self.line_start..line_feed];
            let content = line.strip_suffix(b"\r");
            if content.is_none() && self.line_ends == LineEnds::Strict {
                return Err(HeadError::BareLineEnd);
            }
            if line_feed >= HEAD_BYTES_MAX {
                return Err(self.too_long());
            }
            self.scanned = line_feed + 1;
            if content.unwrap_or(line).is_empty() {
                return Ok(Some(self.scanned));
            }
            self.line_start = self.scanned;
        }
        self.scanned = bytes.len();
        if bytes.len() > HEAD_BYTES_MAX { Err(self.too_long()) } else { Ok(None) }
    }

    fn too_long(&self) -> HeadError {
        if self.line_start == 0 { HeadError::TargetTooLong } else { HeadError::TooLong }
    }
}

/// Empty lines before a request line are ignored (RFC 9112 §2.2).
fn skip_blank_lines(bytes: &[u8]) -> usize {
    bytes.chunks_exact(2).take_while(|pair| pair == b"\r\n").count() * 2
}

fn request(bytes: &Bytes) -> Result<RequestHead, HeadError> {
    let mut lines = [const { std::mem::MaybeUninit::uninit() }; HEADERS_MAX];
    let mut parsed = httparse::Request::new(&mut []);
    let outcome = parsed.parse_with_uninit_headers(bytes, &mut lines).map_err(syntax)?;
    let (Some(method), Some(target), Some(minor)) = (parsed.method, parsed.path, parsed.version)
    else {
        return Err(HeadError::Syntax("it ends early"));
    };
    debug_assert_eq!(outcome, httparse::Status::Complete(bytes.len()));

    let mut head = Request::new(());
    *head.method_mut() =
        Method::from_bytes(method.as_bytes()).map_err(|_| HeadError::Syntax("method"))?;
    *head.version_mut() = version(minor);
    *head.headers_mut() = headers(bytes, parsed.headers)?;
    *head.uri_mut() = request_target(head.method(), bytes.slice_ref(target.as_bytes()))?;
    check_host(&mut head)?;

    let options = ConnectionOptions::of(head.headers());
    let mut framing = request_framing(head.version(), head.headers())?;
    if head.method() == Method::CONNECT {
        if framing != Framing::Empty {
            return Err(HeadError::ContentOnConnect);
        }
        framing = Framing::Tunnel;
    }
    let upgrade = framing == Framing::Empty && asks_for_upgrade(&head, options);
    if upgrade {
        framing = Framing::Tunnel;
    }
    strip_hop_by_hop(head.headers_mut(), upgrade);
    let expects_continue = head.version() == Version::HTTP_11
        && head
            .headers()
            .get(EXPECT)
            .is_some_and(|v| v.as_bytes().eq_ignore_ascii_case(b"100-continue"));
    let keep_alive = keeps_alive(head.version(), options);
    Ok(RequestHead { head, framing, keep_alive, expects_continue, consumed: bytes.len() })
}

fn response(bytes: &Bytes, method: &Method, upgrade: bool) -> Result<ResponseHead, HeadError> {
    let mut lines = [const { std::mem::MaybeUninit::uninit() }; HEADERS_MAX];
    let mut parsed = httparse::Response::new(&mut []);
    let config = httparse::ParserConfig::default();
    config.parse_response_with_uninit_headers(&mut parsed, bytes, &mut lines).map_err(syntax)?;
    let (Some(minor), Some(code)) = (parsed.version, parsed.code) else {
        return Err(HeadError::Syntax("it ends early"));
    };

    let mut head = Response::new(());
    *head.status_mut() = StatusCode::from_u16(code).map_err(|_| HeadError::Syntax("status"))?;
    *head.version_mut() = version(minor);
    *head.headers_mut() = headers(bytes, parsed.headers)?;

    let options = ConnectionOptions::of(head.headers());
    let framing = response_framing(&mut head, method, upgrade)?;
    let keep_alive = keeps_alive(head.version(), options) && framing != Framing::Close;
    let switches = head.status() == StatusCode::SWITCHING_PROTOCOLS;
    strip_hop_by_hop(head.headers_mut(), switches);
    Ok(ResponseHead { head, framing, keep_alive, consumed: bytes.len() })
}

fn version(minor: u8) -> Version {
    if minor == 0 { Version::HTTP_10 } else { Version::HTTP_11 }
}

fn keeps_alive(version: Version, options: ConnectionOptions) -> bool {
    !options.close && (version == Version::HTTP_11 || options.keep_alive)
}

/// Values are slices of the head's one allocation.
pub(super) fn headers(
    bytes: &Bytes,
    lines: &[httparse::Header<'_>],
) -> Result<HeaderMap, HeadError> {
    let mut headers = HeaderMap::with_capacity(lines.len());
    for line in lines {
        let name = HeaderName::from_bytes(line.name.as_bytes())
            .map_err(|_| HeadError::Syntax("header name"))?;
        // An empty value may point nowhere.
        let value = if line.value.is_empty() { Bytes::new() } else { bytes.slice_ref(line.value) };
        let value =
            HeaderValue::from_maybe_shared(value).map_err(|_| HeadError::Syntax("header value"))?;
        headers.append(name, value);
    }
    Ok(headers)
}

fn request_target(method: &Method, target: Bytes) -> Result<Uri, HeadError> {
    // `Uri` drops a fragment without a word, so that the next reader would see another target.
    if target.contains(&b'#') {
        return Err(HeadError::TargetInvalid);
    }
    let origin_form = target.starts_with(b"/") || *target == *b"*";
    let uri = Uri::from_maybe_shared(target).map_err(|_| HeadError::TargetInvalid)?;
    let valid = match (method, uri.scheme(), uri.authority()) {
        (&Method::CONNECT, None, Some(authority)) => {
            authority.port_u16().is_some() && !has_userinfo(authority)
        }
        (&Method::CONNECT, ..) => false,
        (_, Some(scheme), Some(authority)) => {
            (*scheme == Scheme::HTTP || *scheme == Scheme::HTTPS) && !has_userinfo(authority)
        }
        (method, None, None) => origin_form && (uri.path() != "*" || method == Method::OPTIONS),
        _ => false,
    };
    if valid { Ok(uri) } else { Err(HeadError::TargetInvalid) }
}

/// Exactly one in HTTP/1.1 and at most one in 1.0; an absolute target overrides it (RFC 9112
/// §3.2.2).
fn check_host(head: &mut Request<()>) -> Result<(), HeadError> {
    let mut hosts = head.headers().get_all(HOST).into_iter();
    let (host, more) = (hosts.next(), hosts.next());
    if more.is_some() {
        return Err(HeadError::HostRepeated);
    }
    match host {
        Some(host) if !is_host(host.as_bytes()) => return Err(HeadError::HostInvalid),
        None if head.version() == Version::HTTP_11 => return Err(HeadError::HostMissing),
        _ => {}
    }
    if head.method() != Method::CONNECT
        && let Some(authority) = head.uri().authority()
    {
        let host = HeaderValue::from_str(authority.as_str()).map_err(|_| HeadError::HostInvalid)?;
        head.headers_mut().insert(HOST, host);
    }
    Ok(())
}

fn is_host(host: &[u8]) -> bool {
    host.is_empty()
        || Authority::try_from(host).is_ok_and(|authority| {
            let port = authority.as_str()[authority.host().len()..].strip_prefix(':');
            let port_is_number = port.is_none_or(|p| p.bytes().all(|b| b.is_ascii_digit()));
            !has_userinfo(&authority) && !authority.host().is_empty() && port_is_number
        })
}

fn has_userinfo(authority: &Authority) -> bool {
    authority.as_str().contains('@')
}

fn request_framing(version: Version, headers: &HeaderMap) -> Result<Framing, HeadError> {
    Ok(match (chunked(version, headers)?, content_length(headers)?) {
        (true, Some(_)) => return Err(HeadError::LengthWithTransferEncoding),
        (true, None) => Framing::Chunked,
        (false, None | Some(0)) => Framing::Empty,
        (false, Some(length)) => Framing::Length(length),
    })
}

fn response_framing(
    head: &mut Response<()>,
    method: &Method,
    upgrade: bool,
) -> Result<Framing, HeadError> {
    let status = head.status();
    if status == StatusCode::SWITCHING_PROTOCOLS {
        return if upgrade { Ok(Framing::Tunnel) } else { Err(HeadError::SwitchUnasked) };
    }
    if status.is_informational() || status == StatusCode::NO_CONTENT {
        // They have no length to tell (RFC 9110 §8.6).
        head.headers_mut().remove(CONTENT_LENGTH);
        return Ok(Framing::Empty);
    }
    if method == Method::CONNECT && status.is_success() {
        head.headers_mut().remove(CONTENT_LENGTH);
        return Ok(Framing::Tunnel);
    }
    let (chunked, length) =
        (chunked(head.version(), head.headers())?, content_length(head.headers())?);
    if chunked && length.is_some() {
        return Err(HeadError::LengthWithTransferEncoding);
    }
    // The length of what a GET would have got is told all the same.
    if method == Method::HEAD || status == StatusCode::NOT_MODIFIED {
        return Ok(Framing::Empty);
    }
    Ok(match length {
        _ if chunked => Framing::Chunked,
        Some(0) => Framing::Empty,
        Some(length) => Framing::Length(length),
        None => Framing::Close,
    })
}

fn chunked(version: Version, headers: &HeaderMap) -> Result<bool, HeadError> {
    if !headers.contains_key(TRANSFER_ENCODING) {
        return Ok(false);
    }
    if version == Version::HTTP_10 {
        return Err(HeadError::TransferEncodingInHttp10);
    }
    let mut codings = list(headers, &TRANSFER_ENCODING);
    let is_chunked = |coding: &[u8]| coding.eq_ignore_ascii_case(b"chunked");
    match (codings.next(), codings.last()) {
        (Some(only), None) if is_chunked(only) => Ok(true),
        (Some(first), Some(last)) if is_chunked(last) && !is_chunked(first) => {
            Err(HeadError::TransferEncodingUnsupported)
        }
        _ => Err(HeadError::TransferEncodingInvalid),
    }
}

/// Equal values on several lines are one, as RFC 9110 §8.6 allows; they are forwarded as one.
fn content_length(headers: &HeaderMap) -> Result<Option<u64>, HeadError> {
    let mut length = None;
    for value in headers.get_all(CONTENT_LENGTH) {
        let value = value.as_bytes();
        // `parse` takes a sign.
        if value.is_empty() || !value.iter().all(u8::is_ascii_digit) {
            return Err(HeadError::LengthInvalid);
        }
        let value = std::str::from_utf8(value).ok().and_then(|v| v.parse::<u64>().ok());
        let value = value.ok_or(HeadError::LengthInvalid)?;
        if length.is_some_and(|length| length != value) {
            return Err(HeadError::LengthConflict);
        }
        length = Some(value);
    }
    Ok(length)
}

/// An upgrade to HTTP/2 is not passed on: the proxy speaks HTTP/2 by itself, and a server is free
/// to ignore the wish (RFC 9110 §7.8).
fn asks_for_upgrade(head: &Request<()>, options: ConnectionOptions) -> bool {
    let mut protocols = list(head.headers(), &UPGRADE).peekable();
    head.version() == Version::HTTP_11
        && options.upgrade
        && protocols.peek().is_some()
        && protocols.all(|protocol| !protocol.eq_ignore_ascii_case(b"h2c"))
}

fn syntax(error: httparse::Error) -> HeadError {
    HeadError::Syntax(match error {
        httparse::Error::HeaderName => "header name",
        httparse::Error::HeaderValue => "header value",
        httparse::Error::NewLine => "line end",
        httparse::Error::Status => "status",
        httparse::Error::Token => "method or target",
        httparse::Error::TooManyHeaders => return HeadError::TooManyHeaders,
        httparse::Error::Version => return HeadError::VersionUnsupported,
    })
}

/// Envoy's limit is near this, nginx's is a quarter; larger heads get 431.
pub(super) const HEAD_BYTES_MAX: usize = 64 * 1024;
/// More header lines get 431.
pub const HEADERS_MAX: usize = 128;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parse(bytes: &[u8]) -> Result<RequestHead, HeadError> {
        parse_request_head(bytes).map(|head| head.expect("the head is complete"))
    }

    fn refused(head: &str) -> HeadError {
        match parse(head.as_bytes()) {
            Ok(parsed) => panic!("{head:?} was taken for {parsed:?}"),
            Err(error) => error,
        }
    }

    #[test]
    fn requests_that_two_readers_could_read_in_two_ways_are_refused() {
        use HeadError as E;
        let name = E::Syntax("header name");
        let cases = [
            ("GET / HTTP/1.1\nhost: a\n\n", E::BareLineEnd),
            ("GET / HTTP/1.1\r\nhost: a\n\r\n", E::BareLineEnd),
            ("\nGET / HTTP/1.1\r\nhost: a\r\n\r\n", E::BareLineEnd),
            ("GET / HTTP/1.1\r\nhost: a\r\nx: a\rb\r\n\r\n", E::Syntax("header value")),
            ("GET / HTTP/1.1\r\nhost: a\r\nx: a\0b\r\n\r\n", E::Syntax("header value")),
            ("GET / HTTP/1.1\r\nhost : a\r\n\r\n", name),
            ("GET / HTTP/1.1\r\nhost: a\r\ncontent-length : 3\r\n\r\n", name),
            ("GET / HTTP/1.1\r\nhost: a\r\nx: 1\r\n folded\r\n\r\n", name),
            ("GET / HTTP/1.1\r\n host: a\r\n\r\n", name),
            ("GET / HTTP/1.1\r\nhost: a\r\n: empty\r\n\r\n", name),
            ("GET / HTTP/1.1\r\nhost: a\r\nno colon\r\n\r\n", name),
            ("GET  / HTTP/1.1\r\nhost: a\r\n\r\n", E::Syntax("method or target")),
            ("GET / HTTP/1.1 \r\nhost: a\r\n\r\n", E::Syntax("line end")),
            ("GET / HTTP/2.0\r\nhost: a\r\n\r\n", E::VersionUnsupported),
            ("GET / HTTP/1.2\r\nhost: a\r\n\r\n", E::VersionUnsupported),
            ("GET /\r\nhost: a\r\n\r\n", E::Syntax("method or target")),
            ("GET / HTTP/1.1\r\n\r\n", E::HostMissing),
            ("GET http://a/ HTTP/1.1\r\n\r\n", E::HostMissing),
            ("GET / HTTP/1.1\r\nhost: a\r\nhost: a\r\n\r\n", E::HostRepeated),
            ("GET / HTTP/1.0\r\nhost: a\r\nhost: b\r\n\r\n", E::HostRepeated),
            ("GET / HTTP/1.1\r\nhost: a b\r\n\r\n", E::HostInvalid),
            ("GET / HTTP/1.1\r\nhost: a, b\r\n\r\n", E::HostInvalid),
            ("GET / HTTP/1.1\r\nhost: a/b\r\n\r\n", E::HostInvalid),
            ("GET / HTTP/1.1\r\nhost: u@a\r\n\r\n", E::HostInvalid),
            ("GET / HTTP/1.1\r\nhost: a:x\r\n\r\n", E::HostInvalid),
            ("GET a HTTP/1.1\r\nhost: a\r\n\r\n", E::TargetInvalid),
            ("GET a:80 HTTP/1.1\r\nhost: a\r\n\r\n", E::TargetInvalid),
            ("GET * HTTP/1.1\r\nhost: a\r\n\r\n", E::TargetInvalid),
            ("GET /a#b HTTP/1.1\r\nhost: a\r\n\r\n", E::TargetInvalid),
            ("GET ftp://a/ HTTP/1.1\r\nhost: a\r\n\r\n", E::TargetInvalid),
            ("GET http://u@a/ HTTP/1.1\r\nhost: a\r\n\r\n", E::TargetInvalid),
            ("CONNECT /a HTTP/1.1\r\nhost: a\r\n\r\n", E::TargetInvalid),
            ("CONNECT a HTTP/1.1\r\nhost: a\r\n\r\n", E::TargetInvalid),
            ("CONNECT a:1 HTTP/1.1\r\nhost: a\r\ncontent-length: 1\r\n\r\n", E::ContentOnConnect),
        ];
        for (head, expected) in cases {
            assert_eq!(refused(head), expected, "{head:?}");
        }
    }

    #[test]
    fn content_that_two_readers_could_frame_in_two_ways_is_refused() {
        use HeadError as E;
        let cases = [
            ("content-length: 3\r\ntransfer-encoding: chunked", E::LengthWithTransferEncoding),
            ("transfer-encoding: chunked\r\ncontent-length: 0", E::LengthWithTransferEncoding),
            ("content-length: 3\r\ncontent-length: 4", E::LengthConflict),
            ("content-length: 3, 3", E::LengthInvalid),
            ("content-length: +3", E::LengthInvalid),
            ("content-length: -3", E::LengthInvalid),
            ("content-length: 0x3", E::LengthInvalid),
            ("content-length: 3 3", E::LengthInvalid),
            ("content-length:", E::LengthInvalid),
            ("content-length: 18446744073709551616", E::LengthInvalid),
            ("transfer-encoding:", E::TransferEncodingInvalid),
            ("transfer-encoding: identity", E::TransferEncodingInvalid),
            ("transfer-encoding: xchunked", E::TransferEncodingInvalid),
            ("transfer-encoding: chunked, identity", E::TransferEncodingInvalid),
            ("transfer-encoding: chunked\r\ntransfer-encoding: x", E::TransferEncodingInvalid),
            ("transfer-encoding: chunked, chunked", E::TransferEncodingInvalid),
            ("transfer-encoding: \"chunked\"", E::TransferEncodingInvalid),
            ("transfer-encoding: gzip, chunked", E::TransferEncodingUnsupported),
        ];
        for (fields, expected) in cases {
            let head = format!("POST / HTTP/1.1\r\nhost: a\r\n{fields}\r\n\r\n");
            assert_eq!(refused(&head), expected, "{fields:?}");
            let head = format!("HTTP/1.1 200 OK\r\n{fields}\r\n\r\n");
            let response = parse_response_head(head.as_bytes(), &Method::GET, false);
            assert_eq!(response.unwrap_err(), expected, "{fields:?}");
        }
        let old = "POST / HTTP/1.0\r\ntransfer-encoding: chunked\r\n\r\n";
        assert_eq!(refused(old), E::TransferEncodingInHttp10);
    }

    #[test]
    fn requests_that_are_well_formed_are_framed() {
        let head = "\r\n\r\nPOST /a?b=c HTTP/1.1\r\nHost: web:80\r\ncontent-length: 3\r\n\
                    Content-Length: 3\r\nexpect: 100-Continue\r\nx-empty:\r\n\r\n";
        let parsed = parse(format!("{head}abc").as_bytes()).unwrap();
        assert_eq!(parsed.framing, Framing::Length(3));
        assert_eq!(parsed.consumed, head.len());
        assert!(parsed.keep_alive && parsed.expects_continue);
        assert_eq!(parsed.head.uri(), "/a?b=c");
        assert_eq!(parsed.head.headers()["x-empty"], "");

        let chunked = "POST / HTTP/1.1\r\nhost: [::1]:80\r\nTransfer-Encoding: Chunked\r\n\r\n";
        let parsed = parse(chunked.as_bytes()).unwrap();
        assert_eq!(parsed.framing, Framing::Chunked);
        assert!(!parsed.head.headers().contains_key(TRANSFER_ENCODING));

        let absolute = "GET http://web:81/a HTTP/1.1\r\nhost: other\r\nconnection: close\r\n\r\n";
        let parsed = parse(absolute.as_bytes()).unwrap();
        assert_eq!(parsed.head.headers()[HOST], "web:81");
        assert!(!parsed.keep_alive);

        let old = parse(b"GET / HTTP/1.0\r\n\r\n").unwrap();
        assert!(!old.keep_alive && old.framing == Framing::Empty);
        assert!(parse(b"OPTIONS * HTTP/1.1\r\nhost: a\r\n\r\n").is_ok());
        assert_eq!(
            parse(b"CONNECT a:443 HTTP/1.1\r\nhost: a\r\n\r\n").unwrap().framing,
            Framing::Tunnel
        );
    }

    #[test]
    fn an_upgrade_is_kept_unless_it_is_one_to_http2_or_has_content() {
        for (fields, kept) in [
            ("connection: upgrade\r\nupgrade: websocket", true),
            ("connection: keep-alive, Upgrade\r\nupgrade: a, b\r\ncontent-length: 0", true),
            ("upgrade: websocket", false),
            ("connection: upgrade, http2-settings\r\nhttp2-settings: x\r\nupgrade: h2c", false),
            ("connection: upgrade\r\nupgrade: websocket\r\ncontent-length: 1", false),
        ] {
            let head = format!("GET / HTTP/1.1\r\nhost: a\r\n{fields}\r\n\r\n");
            let parsed = parse(head.as_bytes()).unwrap();
            assert_eq!(parsed.framing == Framing::Tunnel, kept, "{fields}");
            assert_eq!(parsed.head.headers().contains_key(UPGRADE), kept, "{fields}");
            assert!(!parsed.head.headers().contains_key("http2-settings"));
        }
    }

    #[test]
    fn responses_are_framed_by_their_request_too() {
        let framing = |head: &str, method: Method, upgrade| {
            parse_response_head(head.as_bytes(), &method, upgrade).unwrap().unwrap().framing
        };
        let ok = "HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n";
        assert_eq!(framing(ok, Method::GET, false), Framing::Length(5));
        assert_eq!(framing(ok, Method::HEAD, false), Framing::Empty);
        assert_eq!(framing(ok, Method::CONNECT, false), Framing::Tunnel);
        assert_eq!(framing("HTTP/1.1 204\r\n\r\n", Method::GET, false), Framing::Empty);
        assert_eq!(
            framing("HTTP/1.1 304 x\r\ncontent-length: 5\r\n\r\n", Method::GET, false),
            Framing::Empty
        );
        assert_eq!(framing("HTTP/1.0 200 OK\n\n", Method::GET, false), Framing::Close);
        assert_eq!(framing("HTTP/1.1 101 x\r\n\r\n", Method::GET, true), Framing::Tunnel);
        let unasked = parse_response_head(b"HTTP/1.1 101 x\r\n\r\n", &Method::GET, false);
        assert_eq!(unasked.unwrap_err(), HeadError::SwitchUnasked);
    }

    #[test]
    fn heads_have_limits() {
        let fields = |count| "a: b\r\n".repeat(count);
        let head = |fields: &str| format!("GET / HTTP/1.1\r\nhost: a\r\n{fields}\r\n");
        assert!(parse(head(&fields(HEADERS_MAX - 1)).as_bytes()).is_ok());
        assert_eq!(refused(&head(&fields(HEADERS_MAX))), HeadError::TooManyHeaders);
        let long = format!("a: {}\r\n", "x".repeat(HEAD_BYTES_MAX));
        assert_eq!(refused(&head(&long)), HeadError::TooLong);
        assert_eq!(HeadError::TooLong.status(), 431);
        let target = format!("GET /{}", "x".repeat(HEAD_BYTES_MAX));
        let error = parse_request_head(target.as_bytes()).unwrap_err();
        assert_eq!((error, error.status()), (HeadError::TargetTooLong, StatusCode::URI_TOO_LONG));
    }

    proptest! {
        #[test]
        fn any_split_of_a_head_parses_alike(
            fields in proptest::collection::vec(
                prop_oneof![
                    Just("host: a".to_owned()),
                    Just("content-length: 3".to_owned()),
                    Just("transfer-encoding: chunked".to_owned()),
                    "[a-z]{1,8} ?: ?[ -~]{0,12}",
                ],
                0..6,
            ),
            end in prop_oneof![Just("\r\n"), Just("\n")],
            cuts in proptest::collection::vec(0usize..200, 0..6),
        ) {
            let wire = format!("GET /a HTTP/1.1\r\n{}\r\n{end}rest", fields.join("\r\n"));
            let whole = parse_request_head(wire.as_bytes()).map(|head| head.map(|h| h.head));
            let mut unread = BytesMut::new();
            let mut scan = HeadScan::new(LineEnds::Strict);
            let mut cuts: Vec<_> = cuts.into_iter().map(|cut| cut.min(wire.len())).collect();
            cuts.sort_unstable();
            cuts.push(wire.len());
            let (mut from, mut outcome) = (0, Ok(None));
            for to in cuts {
                unread.extend_from_slice(&wire.as_bytes()[from..to]);
                from = to;
                outcome = scan.take_request(&mut unread).map(|head| head.map(|h| h.head));
                if !matches!(outcome, Ok(None)) {
                    break;
                }
            }
            prop_assert_eq!(format!("{outcome:?}"), format!("{whole:?}"));
        }

        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = parse_request_head(&bytes);
            let _ = parse_response_head(&bytes, &Method::GET, true);
        }
    }
}
