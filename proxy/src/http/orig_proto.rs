//! HTTP/1 over HTTP/2 between two sidecars, by Linkerd's header `l5d-orig-proto`.
//!
//! The outbound sidecar turns its client's HTTP/1 request into an HTTP/2 one that names the version
//! and, where it matters, the form of the target; the inbound sidecar turns it back, so that the
//! application sees what the client's application sent: version, `Host`, target. The response goes
//! the same way back. The header is a statement of a sidecar: whoever is not a verified peer has it
//! stripped ([`strip`]), and so has whatever an application sends.

use http::header::{CONNECTION, HOST, HeaderName};
use http::uri::{Authority, PathAndQuery, Scheme, Uri};
use http::{HeaderMap, HeaderValue, Request, Response, Version};

use super::error::L5D_PROXY_CONNECTION;
use super::head::{ConnectionOptions, strip_hop_by_hop};

/// Turns a request of HTTP/1 into its HTTP/2 form; one of HTTP/2 stays as it is. The caller has
/// sent those that need a connection of their own elsewhere.
pub fn request_to_http2<B>(request: &mut Request<B>) {
    let Some(version) = name_of(request.version()) else { return };
    let absolute = request.uri().authority().is_some();
    let value = match (version, absolute) {
        (HTTP_10, false) => HeaderValue::from_static(HTTP_10),
        (HTTP_10, true) => HeaderValue::from_static("HTTP/1.0; absolute-form"),
        (_, false) => HeaderValue::from_static(HTTP_11),
        (_, true) => HeaderValue::from_static("HTTP/1.1; absolute-form"),
    };
    if !absolute && let Some(uri) = with_authority(request.uri(), request.headers()) {
        *request.uri_mut() = uri;
    }
    strip_hop_by_hop(request.headers_mut(), false);
    request.headers_mut().insert(L5D_ORIG_PROTO, value);
    *request.version_mut() = Version::HTTP_2;
}

/// Turns a verified peer's request back into what its client sent; one that never was HTTP/1 stays
/// as it is. Says whether it was.
pub fn request_from_http2<B>(request: &mut Request<B>) -> bool {
    let Some(value) = request.headers_mut().remove(L5D_ORIG_PROTO) else { return false };
    let Some((version, absolute)) = parse(&value) else { return false };
    *request.version_mut() = version;
    let authority = request.uri().authority().cloned();
    if !request.headers().contains_key(HOST)
        && let Some(host) = authority.as_ref().map(Authority::as_str)
        && let Ok(host) = HeaderValue::from_str(host)
    {
        request.headers_mut().insert(HOST, host);
    }
    if !absolute && authority.is_some() {
        let path = request.uri().path_and_query().cloned();
        *request.uri_mut() = path.unwrap_or(PathAndQuery::from_static("/")).into();
    }
    true
}

/// Turns the response to such a request into its HTTP/2 form. `Connection: close` of the proxy's
/// own errors travels as `l5d-proxy-connection`.
pub fn response_to_http2<B>(response: &mut Response<B>) {
    let Some(version) = name_of(response.version()) else { return };
    let close = ConnectionOptions::of(response.headers()).close;
    strip_hop_by_hop(response.headers_mut(), false);
    if close {
        let value = HeaderValue::from_static("close");
        response.headers_mut().insert(L5D_PROXY_CONNECTION, value);
    }
    response.headers_mut().insert(L5D_ORIG_PROTO, HeaderValue::from_static(version));
    *response.version_mut() = Version::HTTP_2;
}

/// Turns a verified peer's response back into what its server sent.
pub fn response_from_http2<B>(response: &mut Response<B>) {
    let original = response.headers_mut().remove(L5D_ORIG_PROTO);
    *response.version_mut() = match original.as_ref().and_then(parse) {
        Some((version, _)) => version,
        // A peer that answers in its own name, or an older one, does not say.
        None => Version::HTTP_11,
    };
    if response.headers_mut().remove(L5D_PROXY_CONNECTION).is_some() {
        response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
    }
}

/// Removes what only a verified sidecar may say.
pub fn strip(headers: &mut HeaderMap) {
    headers.remove(L5D_ORIG_PROTO);
    headers.remove(L5D_PROXY_CONNECTION);
}

fn name_of(version: Version) -> Option<&'static str> {
    match version {
        Version::HTTP_10 => Some(HTTP_10),
        Version::HTTP_11 => Some(HTTP_11),
        _ => None,
    }
}

fn parse(value: &HeaderValue) -> Option<(Version, bool)> {
    let mut parts = value.to_str().ok()?.split(';').map(str::trim);
    let version = match parts.next()? {
        HTTP_10 => Version::HTTP_10,
        HTTP_11 => Version::HTTP_11,
        _ => return None,
    };
    Some((version, parts.any(|part| part == "absolute-form")))
}

/// HTTP/2 wants an authority where there is one; a client of HTTP/1.0 may have named none.
fn with_authority(target: &Uri, headers: &HeaderMap) -> Option<Uri> {
    let mut parts = target.clone().into_parts();
    let host = Authority::try_from(headers.get(HOST)?.as_bytes()).ok()?;
    parts.authority = Some(host);
    parts.scheme = Some(Scheme::HTTP);
    parts.path_and_query.get_or_insert(PathAndQuery::from_static("/"));
    Uri::from_parts(parts).ok()
}

/// The version of HTTP that a sidecar's client spoke.
pub const L5D_ORIG_PROTO: HeaderName = HeaderName::from_static("l5d-orig-proto");
const HTTP_10: &str = "HTTP/1.0";
const HTTP_11: &str = "HTTP/1.1";

#[cfg(test)]
mod tests {
    use super::*;

    fn request(version: Version, target: &str, host: Option<&str>) -> Request<()> {
        let mut request = Request::builder().version(version).uri(target);
        if let Some(host) = host {
            request = request.header(HOST, host);
        }
        request.body(()).unwrap()
    }

    #[test]
    fn a_request_comes_out_as_it_went_in() {
        for (version, target, host) in [
            (Version::HTTP_11, "/a?b=c", Some("web.demo:8080")),
            (Version::HTTP_11, "http://web.demo/a?b", Some("web.demo")),
            (Version::HTTP_11, "*", Some("web")),
            (Version::HTTP_11, "/", Some("")),
            (Version::HTTP_10, "/old", None),
            (Version::HTTP_10, "/old", Some("web")),
        ] {
            let mut passed = request(version, target, host);
            request_to_http2(&mut passed);
            assert_eq!(passed.version(), Version::HTTP_2);
            if let Some(host) = host.filter(|h| !h.is_empty()) {
                assert_eq!(passed.uri().authority().unwrap(), host);
                assert_eq!(passed.uri().scheme_str(), Some("http"));
            }
            assert!(request_from_http2(&mut passed));
            let original = request(version, target, host);
            assert_eq!(passed.uri(), original.uri(), "{target}");
            assert_eq!(passed.headers(), original.headers());
            assert_eq!(passed.version(), version);
        }
    }

    #[test]
    fn a_peer_that_sends_no_host_header_means_its_authority() {
        let mut passed = request(Version::HTTP_2, "http://web.demo:80/a", None);
        passed.headers_mut().insert(L5D_ORIG_PROTO, HeaderValue::from_static(HTTP_11));
        assert!(request_from_http2(&mut passed));
        assert_eq!(passed.headers()[HOST], "web.demo:80");
        assert_eq!(passed.uri(), "/a");
    }

    #[test]
    fn http2_is_left_alone() {
        let mut grpc = request(Version::HTTP_2, "http://web/a", None);
        request_to_http2(&mut grpc);
        assert!(grpc.headers().is_empty());
        assert!(!request_from_http2(&mut grpc));
        assert_eq!(grpc.uri(), "http://web/a");
    }

    #[test]
    fn a_response_brings_its_version_and_a_wish_to_close() {
        let mut response =
            Response::builder().version(Version::HTTP_10).header(CONNECTION, "close");
        response = response.header("keep-alive", "1");
        let mut response = response.body(()).unwrap();
        response_to_http2(&mut response);
        assert!(!response.headers().contains_key(CONNECTION));
        assert!(!response.headers().contains_key("keep-alive"));
        assert_eq!(response.version(), Version::HTTP_2);
        response_from_http2(&mut response);
        assert_eq!(response.version(), Version::HTTP_10);
        assert_eq!(response.headers()[CONNECTION], "close");
        assert_eq!(response.headers().len(), 1);
    }
}
