//! The first bytes of a connection. Detection sees them in pieces of any size: what is decided
//! about a beginning must stay true of the whole.

use steadfast_proxy::detect::{Hello, parse_hello};
use steadfast_proxy::http::{Sniffed, sniff as sniff_bytes};
use steadfast_proxy::transport::{Header, Session};

pub(crate) fn client_hello(input: &[u8]) -> bool {
    let whole = parse_hello(input);
    for end in ends(input) {
        let part = parse_hello(&input[..end]);
        assert!(part == Hello::Incomplete || part == whole, "{end}: {part:?}, then {whole:?}");
    }
    matches!(whole, Hello::Client { server_name: Some(_) })
}

pub(crate) fn client_hello_seeds() -> Vec<Vec<u8>> {
    let name = b"web.demo.serviceaccount.identity.steadfast.cluster.local";
    let entry = [&[0][..], &length(name), name].concat();
    let list = [&length(&entry)[..], &entry].concat();
    let extension = [&[0, 0][..], &length(&list), &list].concat();
    let extensions = [&length(&extension)[..], &extension].concat();
    // Version, random, session, one cipher suite, one compression method.
    let fixed = [&[3, 3][..], &[7; 32], &[0], &[0, 2, 0x13, 1], &[1, 0]].concat();
    let body = [fixed, extensions].concat();
    let handshake = [&[1, 0][..], &length(&body), &body].concat();
    let record = |fragment: &[u8]| [&[22, 3, 1][..], &length(fragment), fragment].concat();
    let (first, second) = handshake.split_at(20);
    vec![
        record(&handshake),
        [record(first), record(second)].concat(),
        b"GET / HTTP/1.1\r\n\r\n".to_vec(),
    ]
}

pub(crate) fn sniff(input: &[u8]) -> bool {
    let whole = sniff_bytes(input);
    for end in ends(input) {
        let part = sniff_bytes(&input[..end]);
        assert!(part == Sniffed::NeedMore || part == whole, "{end}: {part:?}, then {whole:?}");
    }
    matches!(whole, Sniffed::Http1 | Sniffed::Http2Preface | Sniffed::Tls)
}

pub(crate) fn sniff_seeds() -> Vec<Vec<u8>> {
    [
        &b"GET /index.html HTTP/1.1\r\nHost: a\r\n\r\n"[..],
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\x16\x03\x01\x00\x05hello",
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"CONNECT db.prod:5432 HTTP/1.1\r\n",
    ]
    .map(<[u8]>::to_vec)
    .into()
}

/// A header that is read is written as one that reads the same.
pub(crate) fn transport_header(input: &[u8]) -> bool {
    for end in ends(input) {
        if let Ok(Some((_, length))) = Header::parse(&input[..end]) {
            assert!(length <= end);
        }
    }
    let Ok(Some((header, length))) = Header::parse(input) else { return false };
    assert!(length <= input.len());
    let written = header.encode();
    assert_eq!(Header::parse(&written).unwrap(), Some((header, written.len())));
    true
}

pub(crate) fn transport_header_seeds() -> Vec<Vec<u8>> {
    let mut seeds: Vec<_> = [Session::Http1, Session::Http2, Session::Opaque]
        .into_iter()
        .map(|protocol| Header { port: 8080, protocol }.encode())
        .collect();
    seeds.push([&seeds[0][..], b"GET / HTTP/1.1\r\n"].concat());
    seeds
}

/// Where to cut: everywhere near the start, then more and more rarely.
fn ends(input: &[u8]) -> impl Iterator<Item = usize> {
    let length = input.len();
    (0..length.min(64)).chain((64..length).step_by(length / 64 + 1))
}

fn length(bytes: &[u8]) -> [u8; 2] {
    (bytes.len() as u16).to_be_bytes()
}
