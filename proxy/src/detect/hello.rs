//! The server name in a TLS ClientHello, read without taking part in the handshake.
//!
//! Only what is needed to tell "TLS for this workload" from "TLS for somebody else" is parsed
//! (RFC 8446, §4.1.2 and §5.1; RFC 6066, §3). Bytes are a peer's: none panic, and the whole is
//! bounded. What parses here is judged again, strictly, by the TLS library.

/// What the first bytes of a connection are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Hello {
    /// A whole ClientHello.
    Client {
        /// The name it asks for, if any.
        server_name: Option<String>,
    },
    /// The beginning of one: more bytes will tell.
    Incomplete,
    /// Anything else.
    NotTls,
}

/// Parses the first bytes of a connection.
pub fn parse(bytes: &[u8]) -> Hello {
    let mut handshake = Vec::new();
    let mut rest = bytes;
    loop {
        match record(rest) {
            Record::Handshake(fragment, next) => {
                handshake.extend_from_slice(fragment);
                rest = next;
            }
            Record::Incomplete => return Hello::Incomplete,
            Record::Other => return Hello::NotTls,
        }
        // Type 1 is client_hello; then a length of three bytes.
        match handshake.as_slice() {
            [1, a, b, c, body @ ..] => {
                let length = u32::from_be_bytes([0, *a, *b, *c]) as usize;
                if length > HELLO_BYTES_MAX {
                    return Hello::NotTls;
                }
                if let Some(body) = body.get(..length) {
                    return match server_name(body) {
                        Some(server_name) => Hello::Client { server_name },
                        None => Hello::NotTls,
                    };
                }
            }
            [] | [1, ..] => {}
            _ => return Hello::NotTls,
        }
        if handshake.len() > HELLO_BYTES_MAX + 4 {
            return Hello::NotTls;
        }
    }
}

enum Record<'a> {
    Handshake(&'a [u8], &'a [u8]),
    Incomplete,
    Other,
}

/// One record of type handshake (22), of any TLS version: clients write 3.1 for compatibility.
fn record(bytes: &[u8]) -> Record<'_> {
    match bytes {
        [22, 3, _, a, b, rest @ ..] => {
            let length = usize::from(u16::from_be_bytes([*a, *b]));
            if length == 0 || length > RECORD_BYTES_MAX {
                return Record::Other;
            }
            match rest.split_at_checked(length) {
                Some((fragment, next)) => Record::Handshake(fragment, next),
                None => Record::Incomplete,
            }
        }
        [] | [22] | [22, 3] | [22, 3, _] | [22, 3, _, _] => Record::Incomplete,
        _ => Record::Other,
    }
}

/// The server name of a ClientHello's body; the outer `None`: malformed.
fn server_name(body: &[u8]) -> Option<Option<String>> {
    // legacy_version and random.
    let body = body.get(2 + 32..)?;
    let (_session_id, body) = vector8(body)?;
    let (_cipher_suites, body) = vector16(body)?;
    let (_compression_methods, body) = vector8(body)?;
    if body.is_empty() {
        return Some(None);
    }
    let (mut extensions, _) = vector16(body)?;
    while !extensions.is_empty() {
        let kind = u16::from_be_bytes([*extensions.first()?, *extensions.get(1)?]);
        let (extension, next) = vector16(extensions.get(2..)?)?;
        if kind == EXTENSION_SERVER_NAME {
            let (names, _) = vector16(extension)?;
            // Type 0 is host_name, the only one there is.
            let name = names.strip_prefix(&[0])?;
            let (name, _) = vector16(name)?;
            return Some(Some(std::str::from_utf8(name).ok()?.to_ascii_lowercase()));
        }
        extensions = next;
    }
    Some(None)
}

/// A vector with a length of one byte, and what follows it.
fn vector8(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let (&length, rest) = bytes.split_first()?;
    rest.split_at_checked(usize::from(length))
}

/// A vector with a length of two bytes, and what follows it.
fn vector16(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let (length, rest) = bytes.split_first_chunk::<2>()?;
    rest.split_at_checked(usize::from(u16::from_be_bytes(*length)))
}

const EXTENSION_SERVER_NAME: u16 = 0;
const RECORD_BYTES_MAX: usize = 1 << 14;
/// Real ones are below 2 KiB; a session ticket or many key shares may make them longer.
pub(super) const HELLO_BYTES_MAX: usize = 1 << 14;

/// What a client that looks for this name sends first.
#[cfg(test)]
pub(crate) fn client_hello(name: &str) -> Vec<u8> {
    let provider = std::sync::Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(rustls::RootCertStore::empty())
        .with_no_client_auth();
    let name = name.to_owned().try_into().unwrap();
    let mut connection = rustls::ClientConnection::new(std::sync::Arc::new(config), name).unwrap();
    let mut bytes = Vec::new();
    connection.write_tls(&mut bytes).unwrap();
    bytes
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_server_name_is_found_and_every_cut_is_incomplete() {
        let bytes = client_hello("Web.demo.serviceaccount.identity.steadfast.cluster.local");
        let name = "web.demo.serviceaccount.identity.steadfast.cluster.local".to_owned();
        assert_eq!(parse(&bytes), Hello::Client { server_name: Some(name) });
        for end in 0..bytes.len() {
            assert_eq!(parse(&bytes[..end]), Hello::Incomplete, "cut at {end}");
        }
    }

    #[test]
    fn a_hello_in_several_records_is_one_hello() {
        let bytes = client_hello("web.demo");
        let mut split = Vec::new();
        for fragment in bytes[5..].chunks(100) {
            split.extend_from_slice(&[22, 3, 1, 0, fragment.len() as u8]);
            split.extend_from_slice(fragment);
        }
        assert_eq!(parse(&split), Hello::Client { server_name: Some("web.demo".to_owned()) });
    }

    #[test]
    fn an_address_has_no_server_name() {
        assert_eq!(parse(&client_hello("127.0.0.1")), Hello::Client { server_name: None });
    }

    #[test]
    fn other_protocols_are_no_tls() {
        for bytes in [&b"GET / HTTP/1.1\r\n"[..], b"PRI * HTTP/2.0", b"\x16\x02", b"\x17\x03\x03"] {
            assert_eq!(parse(bytes), Hello::NotTls);
        }
        // A record of an absurd length, and a ServerHello.
        assert_eq!(parse(&[22, 3, 1, 255, 255]), Hello::NotTls);
        assert_eq!(parse(&[22, 3, 3, 0, 4, 2, 0, 0, 0]), Hello::NotTls);
    }

    proptest! {
        #[test]
        fn any_bytes_are_parsed_without_panic(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
            parse(&bytes);
            parse(&[&[22, 3, 1, 1, 0, 1, 0, 0, 252][..], &bytes].concat());
        }

        #[test]
        fn a_damaged_hello_is_parsed_without_panic(at in 0_usize..1500, byte in any::<u8>()) {
            let mut bytes = client_hello("web.demo");
            let at = at % bytes.len();
            bytes[at] = byte;
            parse(&bytes);
        }
    }
}
