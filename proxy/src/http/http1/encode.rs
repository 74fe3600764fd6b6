//! Heads and content as bytes. Pure.
//!
//! What is written here is framed by what the body says of itself, never by what a header of
//! someone else claims.

use bytes::{BufMut, Bytes, BytesMut};
use http::header::{CONNECTION, CONTENT_LENGTH, COOKIE, HOST, TRANSFER_ENCODING, UPGRADE};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode, Version};

use super::parse::Framing;
use crate::http::body::{BodyError, Frame, Length};

/// What waits to be written: encoded bytes, a large piece of content that is not copied, and the
/// end of its chunk.
#[derive(Debug, Default)]
pub(super) struct Pending {
    pub(super) front: BytesMut,
    pub(super) content: Bytes,
    pub(super) back: &'static [u8],
}

impl Pending {
    pub(super) fn is_empty(&self) -> bool {
        self.front.is_empty() && self.content.is_empty() && self.back.is_empty()
    }

    /// Whether another frame may be added.
    pub(super) fn has_room(&self) -> bool {
        self.content.is_empty() && self.back.is_empty() && self.front.len() < FRONT_BYTES_MAX
    }

    fn add(&mut self, content: Bytes, end: &'static [u8]) {
        if content.len() <= COPIED_BYTES_MAX {
            self.front.extend_from_slice(&content);
            self.front.extend_from_slice(end);
        } else {
            (self.content, self.back) = (content, end);
        }
    }
}

/// Frames the content of one message.
#[derive(Debug)]
pub(super) enum Encoder {
    Chunked,
    Length {
        announced: u64,
        remaining: u64,
    },
    /// Until the connection closes; tunnels too.
    Raw,
    /// The message cannot have content; a body that ends late, without any, is waited for.
    Skip,
}

impl Encoder {
    pub(super) fn new(framing: Framing) -> Self {
        match framing {
            Framing::Chunked => Self::Chunked,
            Framing::Close | Framing::Tunnel => Self::Raw,
            Framing::Empty => Self::Skip,
            Framing::Length(bytes) => Self::Length { announced: bytes, remaining: bytes },
        }
    }

    pub(super) fn frame(&mut self, frame: Frame, out: &mut Pending) -> Result<(), BodyError> {
        match (self, frame) {
            (_, Frame::Data(data)) if data.is_empty() => {}
            (Self::Chunked, Frame::Data(data)) => {
                put_hex(&mut out.front, data.len());
                out.front.put_slice(b"\r\n");
                out.add(data, b"\r\n");
            }
            (Self::Length { announced, remaining }, Frame::Data(data)) => {
                let wrong = BodyError::WrongLength { announced: *announced };
                *remaining = remaining.checked_sub(data.len() as u64).ok_or(wrong)?;
                out.add(data, b"");
            }
            (Self::Raw, Frame::Data(data)) => out.add(data, b""),
            (Self::Chunked, Frame::Trailers(trailers)) => {
                out.front.put_slice(b"0\r\n");
                for (name, value) in &trailers {
                    put_field(&mut out.front, name, value);
                }
                out.front.put_slice(b"\r\n");
                // `finish` has nothing to add.
                return Ok(());
            }
            // Only chunks have room for trailers.
            (Self::Skip, Frame::Data(_)) | (_, Frame::Trailers(_)) => {}
        }
        Ok(())
    }

    /// The end of the content; `trailers` is whether it ended with some.
    pub(super) fn finish(&self, trailers: bool, out: &mut Pending) -> Result<(), BodyError> {
        match self {
            Self::Chunked if !trailers => out.front.put_slice(b"0\r\n\r\n"),
            Self::Length { announced, remaining: 1.. } => {
                return Err(BodyError::WrongLength { announced: *announced });
            }
            _ => {}
        }
        Ok(())
    }
}

/// How a response with content is framed for the client that waits for it.
pub(super) fn response_framing(version: Version, length: Length) -> Framing {
    match length {
        Length::Exact(0) => Framing::Empty,
        Length::Exact(bytes) => Framing::Length(bytes),
        Length::Unknown if version == Version::HTTP_11 => Framing::Chunked,
        Length::Unknown => Framing::Close,
    }
}

/// Whether a response never has content: what it tells of its length is kept (`Some(true)`, the
/// length of what GET would get) or must go (`Some(false)`).
pub(super) fn bodiless(method: &Method, status: StatusCode) -> Option<bool> {
    match status {
        StatusCode::NO_CONTENT => Some(false),
        status if status.is_informational() => Some(false),
        StatusCode::NOT_MODIFIED => Some(true),
        _ if *method == Method::HEAD => Some(true),
        _ => None,
    }
}

/// What a head says of the length of its content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum LengthField {
    /// What its own header says, if it has one.
    AsTold,
    /// Nothing.
    None,
    /// What the framing is.
    Of(Framing),
}

/// What the connection's own fields say in a head that is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ConnectionField {
    Close,
    KeepAlive,
    None,
    Upgrade,
}

pub(super) fn put_response(
    out: &mut BytesMut,
    head: &Response<()>,
    version: Version,
    length: LengthField,
    connection: ConnectionField,
) {
    put_version(out, version);
    out.put_slice(b" ");
    out.put_slice(head.status().as_str().as_bytes());
    out.put_slice(b" ");
    out.put_slice(head.status().canonical_reason().unwrap_or_default().as_bytes());
    out.put_slice(b"\r\n");
    put_fields(out, head.headers(), length == LengthField::AsTold);
    if let LengthField::Of(framing) = length {
        put_framing(out, framing);
    }
    put_connection(out, connection);
    out.put_slice(b"\r\n");
}

/// Writes a request's head. HTTP/2 requests become HTTP/1.1.
pub(super) fn put_request(
    out: &mut BytesMut,
    head: &Request<()>,
    framing: Framing,
    connection: ConnectionField,
) {
    let version = match head.version() {
        Version::HTTP_10 if framing != Framing::Chunked => Version::HTTP_10,
        _ => Version::HTTP_11,
    };
    out.put_slice(head.method().as_str().as_bytes());
    out.put_slice(b" ");
    let from_http2 = head.version() > Version::HTTP_11;
    let uri = head.uri();
    match (uri.scheme_str(), uri.authority()) {
        (Some(scheme), Some(authority)) if !from_http2 => {
            out.put_slice(scheme.as_bytes());
            out.put_slice(b"://");
            out.put_slice(authority.as_str().as_bytes());
            out.put_slice(path_of(head).as_bytes());
        }
        (_, Some(authority)) if head.method() == Method::CONNECT => {
            out.put_slice(authority.as_str().as_bytes());
        }
        _ => out.put_slice(path_of(head).as_bytes()),
    }
    out.put_slice(b" ");
    put_version(out, version);
    out.put_slice(b"\r\n");
    // In HTTP/2 the authority is what counts; the header, if there is one, is a courtesy.
    match (head.headers().get(HOST), uri.authority()) {
        (Some(host), authority) if !from_http2 || authority.is_none() => {
            put_field(out, &HOST, host);
        }
        (_, Some(authority)) => {
            out.put_slice(b"host: ");
            out.put_slice(authority.as_str().as_bytes());
            out.put_slice(b"\r\n");
        }
        (_, None) => {}
    }
    // A length of zero that the client told stays told.
    let told_zero = framing == Framing::Empty && head.headers().contains_key(CONTENT_LENGTH);
    put_fields(out, head.headers(), false);
    let meant_to_have_content = [Method::POST, Method::PUT, Method::PATCH].contains(head.method());
    if framing != Framing::Empty || told_zero || (from_http2 && meant_to_have_content) {
        put_framing(out, framing);
    }
    put_connection(out, connection);
    out.put_slice(b"\r\n");
}

fn path_of(head: &Request<()>) -> &str {
    head.uri().path_and_query().map_or("/", |path| path.as_str())
}

fn put_version(out: &mut BytesMut, version: Version) {
    out.put_slice(if version == Version::HTTP_10 { b"HTTP/1.0" } else { b"HTTP/1.1" });
}

fn put_framing(out: &mut BytesMut, framing: Framing) {
    match framing {
        Framing::Chunked => out.put_slice(b"transfer-encoding: chunked\r\n"),
        Framing::Empty => out.put_slice(b"content-length: 0\r\n"),
        Framing::Length(bytes) => {
            out.put_slice(b"content-length: ");
            put_decimal(out, bytes);
            out.put_slice(b"\r\n");
        }
        Framing::Close | Framing::Tunnel => {}
    }
}

fn put_connection(out: &mut BytesMut, connection: ConnectionField) {
    out.put_slice(match connection {
        ConnectionField::Close => b"connection: close\r\n",
        ConnectionField::KeepAlive => b"connection: keep-alive\r\n",
        ConnectionField::None => b"",
        ConnectionField::Upgrade => b"connection: upgrade\r\n",
    });
}

/// All but what this connection writes itself.
fn put_fields(out: &mut BytesMut, headers: &HeaderMap, with_length: bool) {
    for (name, value) in headers {
        let own = *name == HOST
            || *name == CONNECTION
            || *name == TRANSFER_ENCODING
            || (*name == CONTENT_LENGTH && !with_length)
            || *name == COOKIE;
        if !own {
            put_field(out, name, value);
        }
    }
    put_cookies(out, headers);
}

/// HTTP/2 may split cookies into several fields, of which HTTP/1 allows one (RFC 9113 §8.2.3).
fn put_cookies(out: &mut BytesMut, headers: &HeaderMap) {
    for (at, cookie) in headers.get_all(COOKIE).iter().enumerate() {
        out.put_slice(if at == 0 { b"cookie: " } else { b"; " });
        out.put_slice(cookie.as_bytes());
    }
    if headers.contains_key(COOKIE) {
        out.put_slice(b"\r\n");
    }
}

fn put_field(out: &mut BytesMut, name: &HeaderName, value: &HeaderValue) {
    out.put_slice(name.as_str().as_bytes());
    out.put_slice(b": ");
    out.put_slice(value.as_bytes());
    out.put_slice(b"\r\n");
}

fn put_hex(out: &mut BytesMut, number: usize) {
    let digits = (usize::BITS - number.leading_zeros()).div_ceil(4).max(1);
    for digit in (0..digits).rev() {
        out.put_u8(b"0123456789abcdef"[number >> (digit * 4) & 0xf]);
    }
}

fn put_decimal(out: &mut BytesMut, number: u64) {
    let mut digits = [0; 20];
    let (mut at, mut rest) = (digits.len(), number);
    while at == digits.len() || rest > 0 {
        at -= 1;
        digits[at] = b'0' + u8::try_from(rest % 10).unwrap_or_default();
        rest /= 10;
    }
    out.put_slice(&digits[at..]);
}

/// `Connection` for a tunnel's head.
pub(super) fn upgrade_field(headers: &HeaderMap) -> ConnectionField {
    if headers.contains_key(UPGRADE) { ConnectionField::Upgrade } else { ConnectionField::None }
}

/// Content up to this size is copied behind its head, so that both leave in one write.
const COPIED_BYTES_MAX: usize = 4 * 1024;
/// No more frames are taken while this much waits.
const FRONT_BYTES_MAX: usize = 16 * 1024;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn framed(framing: Framing, frames: Vec<Frame>) -> Result<String, BodyError> {
        let (mut encoder, mut out) = (Encoder::new(framing), Pending::default());
        let trailers = matches!(frames.last(), Some(Frame::Trailers(_)));
        for frame in frames {
            encoder.frame(frame, &mut out)?;
        }
        encoder.finish(trailers, &mut out)?;
        Ok(String::from_utf8(out.front.to_vec()).unwrap())
    }

    fn data(text: &'static str) -> Frame {
        Frame::Data(Bytes::from_static(text.as_bytes()))
    }

    #[test]
    fn content_is_framed_as_announced() {
        assert_eq!(framed(Framing::Length(3), vec![data("ab"), data("c")]).unwrap(), "abc");
        assert_eq!(framed(Framing::Close, vec![data("ab")]).unwrap(), "ab");
        let chunked = framed(Framing::Chunked, vec![data("ab"), data(""), data("c")]).unwrap();
        assert_eq!(chunked, "2\r\nab\r\n1\r\nc\r\n0\r\n\r\n");
        let mut trailers = HeaderMap::new();
        trailers.insert("x-sum", HeaderValue::from_static("1"));
        let chunked = framed(Framing::Chunked, vec![Frame::Trailers(trailers)]).unwrap();
        assert_eq!(chunked, "0\r\nx-sum: 1\r\n\r\n");
    }

    #[test]
    fn content_of_another_length_than_announced_is_an_error() {
        for frames in [vec![], vec![data("ab")], vec![data("abcd")]] {
            let error = framed(Framing::Length(3), frames).unwrap_err();
            assert!(matches!(error, BodyError::WrongLength { announced: 3 }));
        }
    }

    #[test]
    fn an_http2_request_becomes_http1() {
        let head = Request::builder()
            .version(Version::HTTP_2)
            .method(Method::POST)
            .uri("http://web.demo/a?b")
            .header(HOST, "other")
            .header(COOKIE, "a=1")
            .header(COOKIE, "b=2")
            .body(())
            .unwrap();
        let mut out = BytesMut::new();
        put_request(&mut out, &head, Framing::Empty, ConnectionField::None);
        let expected = "POST /a?b HTTP/1.1\r\nhost: web.demo\r\ncookie: a=1; b=2\r\n\
                        content-length: 0\r\n\r\n";
        assert_eq!(out, expected);
    }

    proptest! {
        #[test]
        fn numbers_are_written_as_std_writes_them(number: u64) {
            let mut out = BytesMut::new();
            put_decimal(&mut out, number);
            put_hex(&mut out, number as usize);
            prop_assert_eq!(out, format!("{number}{number:x}"));
        }
    }
}
