//! Which protocol do the first bytes of a connection speak?
//!
//! A pure function of the bytes seen so far. It looks for the start of a TLS record, the HTTP/2
//! preface and the shape of an HTTP/1 request line; all else is opaque. It decides as early as it
//! can, and never asks for more than [`SNIFF_BYTES_MAX`].

/// What the first bytes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sniffed {
    /// A request line of HTTP/1.0 or 1.1.
    Http1,
    /// The connection preface of HTTP/2.
    Http2Preface,
    /// Too few bytes to tell.
    NeedMore,
    /// None of the others.
    Opaque,
    /// A TLS handshake record.
    Tls,
}

/// Tells the protocol from the bytes that came first.
pub fn sniff(bytes: &[u8]) -> Sniffed {
    match bytes {
        [] => Sniffed::NeedMore,
        [TLS_HANDSHAKE, rest @ ..] => sniff_tls(rest),
        _ if bytes.starts_with(PREFACE) => Sniffed::Http2Preface,
        _ if PREFACE.starts_with(bytes) => Sniffed::NeedMore,
        _ => sniff_http1(bytes),
    }
}

/// A record's version is 3.x for every TLS there is.
fn sniff_tls(after_type: &[u8]) -> Sniffed {
    match after_type {
        [] => Sniffed::NeedMore,
        [3, ..] => Sniffed::Tls,
        _ => Sniffed::Opaque,
    }
}

/// `METHOD SP target SP HTTP/1.x`. A method alone would take every text protocol whose first word
/// is followed by a space (`HELO host`, `PING :x`) for HTTP, so the version is waited for, unless
/// the line cannot be a request line any more.
fn sniff_http1(bytes: &[u8]) -> Sniffed {
    // Servers ignore empty lines before the request line (RFC 9112 §2.2), so does this.
    let mut text = bytes;
    while let Some(rest) = text.strip_prefix(b"\r\n") {
        text = rest;
    }
    if matches!(text, [] | [b'\r']) {
        let asked_enough = bytes.len() >= SNIFF_BYTES_MAX;
        return if asked_enough { Sniffed::Opaque } else { Sniffed::NeedMore };
    }
    let line_end = text.iter().position(|&b| b == b'\r' || b == b'\n');
    let line = &text[..line_end.unwrap_or(text.len())];
    let mut words = line.splitn(3, |&b| b == b' ');
    let method = words.next().unwrap_or_default();
    if method.is_empty() || method.len() > METHOD_BYTES_MAX || !method.iter().all(is_token) {
        return Sniffed::Opaque;
    }
    let (target, version) = (words.next(), words.next());
    if target.is_some_and(|t| t.iter().any(u8::is_ascii_control)) {
        return Sniffed::Opaque;
    }
    match version {
        Some(version) if version.starts_with(b"HTTP/1.") => Sniffed::Http1,
        Some(version) if line_end.is_none() && b"HTTP/1.".starts_with(version) => more(bytes),
        None if line_end.is_none() => more(bytes),
        _ => Sniffed::Opaque,
    }
}

/// A line this long that might still become HTTP is taken for it: its server answers 431 to it,
/// which tells more than an opaque connection could.
fn more(bytes: &[u8]) -> Sniffed {
    if bytes.len() < SNIFF_BYTES_MAX { Sniffed::NeedMore } else { Sniffed::Http1 }
}

fn is_token(byte: &u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(byte)
}

/// More bytes than these are never asked for.
pub const SNIFF_BYTES_MAX: usize = 8 * 1024;
/// The longest registered method, `UPDATEREDIRECTREF`, has 17.
const METHOD_BYTES_MAX: usize = 24;
const TLS_HANDSHAKE: u8 = 22;
/// RFC 9113 §3.4.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn each_protocol_is_told_by_its_first_bytes() {
        let cases: &[(&[u8], Sniffed)] = &[
            (b"GET / HTTP/1.1\r\nhost: a\r\n\r\n", Sniffed::Http1),
            (b"\r\nGET / HTTP/1.0\r\n", Sniffed::Http1),
            (b"M-SEARCH * HTTP/1.1", Sniffed::Http1),
            (b"GET / HTTP/1.", Sniffed::Http1),
            (b"GET / HTTP/1", Sniffed::NeedMore),
            (b"GE", Sniffed::NeedMore),
            (b"GET /long", Sniffed::NeedMore),
            (b"GET /\r\n", Sniffed::Opaque),
            (b"GET / HTTP/2.0\r\n", Sniffed::Opaque),
            (b"HELO there\r\n", Sniffed::Opaque),
            (b"SSH-2.0-OpenSSH_9.7\r\n", Sniffed::Opaque),
            (b"\x00\x00\x00\x08\x04\xd2\x16\x2f", Sniffed::Opaque),
            (b"*1\r\n$4\r\nPING\r\n", Sniffed::Opaque),
            (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", Sniffed::Http2Preface),
            (b"PRI * HTTP/2.0", Sniffed::NeedMore),
            (b"PRI * HTTP/2.0\r\nhost", Sniffed::Opaque),
            (b"\x16\x03\x01\x02\x00", Sniffed::Tls),
            (b"\x16", Sniffed::NeedMore),
            (b"\x16\x00", Sniffed::Opaque),
        ];
        for (bytes, expected) in cases {
            assert_eq!(sniff(bytes), *expected, "{:?}", String::from_utf8_lossy(bytes));
        }
    }

    #[test]
    fn it_stops_asking() {
        let endless = [b"GET /".as_slice(), &vec![b'a'; SNIFF_BYTES_MAX]].concat();
        assert_eq!(sniff(&endless[..SNIFF_BYTES_MAX - 1]), Sniffed::NeedMore);
        assert_eq!(sniff(&endless), Sniffed::Http1);
    }

    proptest! {
        #[test]
        fn more_bytes_never_change_a_decision(
            bytes in prop_oneof![
                proptest::collection::vec(any::<u8>(), 0..64),
                "[A-Z]{1,5} [ -~]{0,20}( HTTP/[12]\\.[01]\r\n)?".prop_map(String::into_bytes),
            ],
        ) {
            let mut decided = Sniffed::NeedMore;
            for end in 0..=bytes.len() {
                let now = sniff(&bytes[..end]);
                prop_assert!(decided == Sniffed::NeedMore || now == decided);
                decided = now;
            }
        }
    }
}
