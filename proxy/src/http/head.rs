//! What heads say about connections, and what must not pass from one connection to the next.
//!
//! Pure functions of header maps. RFC 9110 §7.6.1 says which fields belong to one hop.

use http::header::{
    CONNECTION, CONTENT_LENGTH, CONTENT_TYPE, HOST, HeaderName, TE, TRAILER, TRANSFER_ENCODING,
    UPGRADE,
};
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, Version};

/// Whether an exchange ends as a tunnel, if its server agrees: such a request cannot share an
/// HTTP/2 connection and gets a mesh connection of its own, over which plain HTTP/1 is spoken.
pub fn needs_own_connection<B>(request: &Request<B>) -> bool {
    request.method() == Method::CONNECT || request.headers().contains_key(UPGRADE)
}

/// Whether a response turns its exchange into a tunnel.
pub fn begins_tunnel<B>(method: &Method, response: &Response<B>) -> bool {
    let status = response.status();
    status == StatusCode::SWITCHING_PROTOCOLS || (*method == Method::CONNECT && status.is_success())
}

/// Whether a request speaks gRPC, so that errors must be told in its own way.
pub fn is_grpc(version: Version, headers: &HeaderMap) -> bool {
    let Some(content_type) = headers.get(CONTENT_TYPE) else { return false };
    version == Version::HTTP_2
        && content_type
            .as_bytes()
            .strip_prefix(b"application/grpc")
            .is_some_and(|rest| matches!(rest.first(), None | Some(b'+' | b';')))
}

/// What a `Connection` header asks for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct ConnectionOptions {
    pub(super) close: bool,
    pub(super) keep_alive: bool,
    pub(super) upgrade: bool,
}

impl ConnectionOptions {
    pub(super) fn of(headers: &HeaderMap) -> Self {
        let mut options = Self::default();
        for option in list(headers, &CONNECTION) {
            options.close |= option.eq_ignore_ascii_case(b"close");
            options.keep_alive |= option.eq_ignore_ascii_case(b"keep-alive");
            options.upgrade |= option.eq_ignore_ascii_case(b"upgrade");
        }
        options
    }
}

/// Removes the fields that belong to the hop on which the message came: those that are known to,
/// and those that `Connection` names. `Upgrade` stays if `keep_upgrade`; `TE: trailers` stays,
/// since gRPC asks for it end to end.
pub(super) fn strip_hop_by_hop(headers: &mut HeaderMap, keep_upgrade: bool) {
    if headers.contains_key(CONNECTION) {
        let named: Vec<_> = list(headers, &CONNECTION)
            .filter_map(|option| HeaderName::from_bytes(option).ok())
            .filter(|name| !KEPT_THOUGH_NAMED.contains(name))
            .collect();
        for name in named {
            headers.remove(name);
        }
        headers.remove(CONNECTION);
    }
    for name in [&KEEP_ALIVE, &PROXY_CONNECTION, &HTTP2_SETTINGS, &TRANSFER_ENCODING] {
        headers.remove(name);
    }
    if !keep_upgrade {
        headers.remove(UPGRADE);
    }
    if headers.contains_key(TE) {
        let trailers = list(headers, &TE).any(|coding| coding.eq_ignore_ascii_case(b"trailers"));
        headers.remove(TE);
        if trailers {
            headers.insert(TE, HeaderValue::from_static("trailers"));
        }
    }
}

/// Removes the fields that must not be in trailers because they say how a message is framed or
/// routed (RFC 9110 §6.5.1).
pub(super) fn strip_from_trailers(trailers: &mut HeaderMap) {
    strip_hop_by_hop(trailers, false);
    for name in [&CONTENT_LENGTH, &HOST, &TE, &TRAILER] {
        trailers.remove(name);
    }
}

/// The members of a list field, over all its lines, without white space and empty ones.
pub(super) fn list<'a>(
    headers: &'a HeaderMap,
    name: &HeaderName,
) -> impl Iterator<Item = &'a [u8]> {
    headers
        .get_all(name)
        .into_iter()
        .flat_map(|value| value.as_bytes().split(|&b| b == b','))
        .map(<[u8]>::trim_ascii)
        .filter(|member| !member.is_empty())
}

/// A `Connection` header that names these is an attack or a mistake: they are end-to-end, or
/// handled by name.
const KEPT_THOUGH_NAMED: [HeaderName; 5] = [CONTENT_LENGTH, HOST, TE, TRANSFER_ENCODING, UPGRADE];
const HTTP2_SETTINGS: HeaderName = HeaderName::from_static("http2-settings");
const KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");
const PROXY_CONNECTION: HeaderName = HeaderName::from_static("proxy-connection");

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(fields: &[(&str, &str)]) -> HeaderMap {
        let mut map = HeaderMap::new();
        for (name, value) in fields {
            let name = HeaderName::from_bytes(name.as_bytes()).unwrap();
            map.append(name, HeaderValue::from_str(value).unwrap());
        }
        map
    }

    #[test]
    fn what_belongs_to_a_hop_stays_on_it() {
        let mut map = headers(&[
            ("connection", "close, X-Mine , host,content-length"),
            ("connection", "upgrade"),
            ("x-mine", "1"),
            ("host", "web"),
            ("content-length", "3"),
            ("keep-alive", "timeout=5"),
            ("proxy-connection", "keep-alive"),
            ("transfer-encoding", "chunked"),
            ("te", "gzip, trailers"),
            ("upgrade", "websocket"),
            ("accept", "*/*"),
        ]);
        let options = ConnectionOptions::of(&map);
        assert_eq!(options, ConnectionOptions { close: true, keep_alive: false, upgrade: true });
        let mut upgrading = map.clone();
        strip_hop_by_hop(&mut map, false);
        let expected =
            &[("host", "web"), ("content-length", "3"), ("accept", "*/*"), ("te", "trailers")];
        assert_eq!(map, headers(expected));
        strip_hop_by_hop(&mut upgrading, true);
        assert_eq!(upgrading.get(UPGRADE).unwrap(), "websocket");
    }

    #[test]
    fn grpc_is_told_from_what_only_looks_like_it() {
        for (content_type, expected) in [
            ("application/grpc", true),
            ("application/grpc+proto", true),
            ("application/grpc;charset=utf-8", true),
            ("application/grpc-web", false),
            ("application/json", false),
        ] {
            let map = headers(&[("content-type", content_type)]);
            assert_eq!(is_grpc(Version::HTTP_2, &map), expected, "{content_type}");
            assert!(!is_grpc(Version::HTTP_11, &map));
        }
    }
}
