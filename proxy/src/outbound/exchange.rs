//! The story of one request of the workload's own.

use std::io;
use std::net::SocketAddr;
use std::rc::Rc;

use http::header::HOST;
use http::uri::{PathAndQuery, Scheme};
use http::{HeaderValue, Method, Request, Response, StatusCode, Uri, Version};

use super::routes::{Chosen, Route};
use super::{ATTEMPTS_MAX, Dialled, Known, Outbound};
use crate::answer;
use crate::connect::{Failed, Unanswered, tunnel};
use crate::http::error::{GrpcStatus, L5D_PROXY_ERROR};
use crate::http::{
    Body, End, Exchange, Frame, Observer, ProxyError, SendErrorKind, Shape, abort, begins_tunnel,
    needs_own_connection, orig_proto,
};
use crate::metrics::{Direction, HttpMeter, Outcome};
use crate::refusal::Refusal;
use crate::target::Target;
use crate::transport::Session;

/// Serves the requests of one connection.
pub(super) struct Serving {
    outbound: Rc<Outbound>,
    client: SocketAddr,
    /// Where the connection goes; `None`: each request says.
    route: Option<Route>,
}

/// An answer and who counts it.
type Answered = (Response<Body>, Rc<HttpMeter>);

/// Why a request got no answer.
enum Unserved {
    /// It cannot be understood.
    Asked(ProxyError),
    /// It got none; counted and logged where it happened.
    Failed(Unanswerable),
}

/// A request that got no answer, and who counts that, if an endpoint was found for it.
struct Unanswerable {
    failed: Failed,
    meter: Option<Rc<HttpMeter>>,
}

impl Serving {
    pub(super) fn new(outbound: Rc<Outbound>, client: SocketAddr, route: Option<Route>) -> Self {
        Self { outbound, client, route }
    }

    async fn answer(&self, mut request: Request<Body>) -> Result<Answered, Unserved> {
        if let Some(route) = &self.route {
            return self.send(route, request).await.map_err(Unserved::Failed);
        }
        let target = destination(&request).map_err(Unserved::Asked)?;
        let route = self.outbound.routes.resolve(&target).await;
        let route = route.map_err(|refusal| Unserved::Failed(self.tell(refusal, None)))?;
        if request.method() == Method::CONNECT {
            return self.connect(&route, request).await.map_err(Unserved::Failed);
        }
        to_origin_form(&mut request);
        self.send(&route, request).await.map_err(Unserved::Failed)
    }

    /// CONNECT: bytes to one of the endpoints.
    async fn connect(
        &self,
        route: &Route,
        request: Request<Body>,
    ) -> Result<Answered, Unanswerable> {
        let dialled = self.outbound.dial(route).await;
        let Dialled { io, known } = dialled.map_err(|refusal| self.tell(refusal, None))?;
        let meter = self.outbound.routes.meter(route, known.chosen.endpoint());
        meter.request();
        let Known { addr, late, bounds, chosen } = known;
        let connect = self.outbound.connect.clone();
        let broken = move |spoke, error: &io::Error| {
            connect.report_broken(addr, late.as_ref(), spoke, error);
        };
        let response = tunnel(io, request.into_body(), &self.outbound.http, broken);
        let response = self.outbound.ages.tunnel(&bounds, response);
        Ok((holding(response, chosen), meter))
    }

    /// Sends a request to an endpoint; to another one if it was not processed there.
    async fn send(
        &self,
        route: &Route,
        mut request: Request<Body>,
    ) -> Result<Answered, Unanswerable> {
        let routes = &self.outbound.routes;
        let (mut attempts, mut last) = (1, None);
        loop {
            let chosen = routes.choose(route).await;
            let chosen = chosen.map_err(|refusal| self.tell(refusal, last.take()))?;
            let meter = routes.meter(route, chosen.endpoint());
            let started = self.outbound.clock.since_boot();
            if attempts == 1 {
                meter.request();
            }
            match self.send_to(route, &chosen, request).await {
                Ok(response) => {
                    let now = self.outbound.clock.since_boot();
                    chosen.responded(now);
                    meter.latency(now.saturating_sub(started));
                    if chosen.endpoint().identity.is_some()
                        && let Some(refusal) = word_of_the_peer(&response)
                    {
                        let addr = chosen.endpoint().addr;
                        self.outbound.connect.report(Direction::Outbound, addr, &refusal);
                    }
                    return Ok((holding(response, chosen), meter));
                }
                Err(Unanswered { failed, request: Some(again) })
                    if attempts < ATTEMPTS_MAX && is_unprocessed(&failed) =>
                {
                    if is_refused(&failed) {
                        routes.refused(&chosen);
                    }
                    self.outbound.metrics.retried(Direction::Outbound, answer::label(&failed));
                    (request, attempts, last) = (*again, attempts + 1, Some(meter));
                }
                Err(Unanswered { failed, .. }) => {
                    if is_refused(&failed) {
                        routes.refused(&chosen);
                    }
                    return Err(Unanswerable { failed, meter: Some(meter) });
                }
            }
        }
    }

    async fn send_to(
        &self,
        route: &Route,
        chosen: &Chosen,
        mut request: Request<Body>,
    ) -> Result<Response<Body>, Unanswered> {
        let (connect, endpoint) = (&self.outbound.connect, chosen.endpoint());
        let direction = Direction::Outbound;
        let labels = || route.labels(endpoint).with("peer", "dst");
        if let Some(authority) = &endpoint.authority_override {
            override_authority(&mut request, authority);
        }
        if needs_own_connection(&request) && request.version() != Version::HTTP_2 {
            return match connect.endpoint(endpoint, Session::Http1, labels()).await {
                Ok(server) => {
                    chosen.connected();
                    let (method, bounds) = (request.method().clone(), server.bounds.clone());
                    let addr = endpoint.addr;
                    let response = connect.send_alone(direction, addr, server, request).await?;
                    if !begins_tunnel(&method, &response) {
                        return Ok(response);
                    }
                    Ok(self.outbound.ages.tunnel(&bounds, response))
                }
                Err(refusal) => {
                    connect.report(direction, endpoint.addr, &refusal);
                    let failed = Failed::Connect(Rc::new(refusal));
                    Err(Unanswered { failed, request: Some(Box::new(request)) })
                }
            };
        }
        if endpoint.identity.is_none() {
            // It may have been made ready for a meshed one before.
            orig_proto::request_from_http2(&mut request);
            if request.version() != Version::HTTP_2 {
                return connect.send_http1(direction, endpoint.addr, labels(), request).await;
            }
            return connect.send_http2(direction, endpoint, labels, request).await;
        }
        let was_http1 = request.version() != Version::HTTP_2
            || request.headers().contains_key(orig_proto::L5D_ORIG_PROTO);
        orig_proto::request_to_http2(&mut request);
        let mut response = connect.send_http2(direction, endpoint, labels, request).await?;
        chosen.connected();
        if was_http1 {
            orig_proto::response_from_http2(&mut response);
        }
        Ok(response)
    }

    /// Counts and logs a refusal for which there was no connection to a server.
    fn tell(&self, refusal: Refusal, meter: Option<Rc<HttpMeter>>) -> Unanswerable {
        let now = self.outbound.clock.since_boot();
        self.outbound.reporter.report(now, Direction::Outbound, self.client, &refusal);
        Unanswerable { failed: Failed::Connect(Rc::new(refusal)), meter }
    }
}

impl Exchange for Serving {
    async fn exchange(&self, mut request: Request<Body>) -> Response<Body> {
        let (shape, version) = (Shape::of(&request), request.version());
        // Only a sidecar may say these.
        orig_proto::strip(request.headers_mut());
        let Unanswerable { failed, meter } = match Box::pin(self.answer(request)).await {
            Ok((response, meter)) => return answer::counted(response, meter),
            Err(Unserved::Failed(unanswerable)) => unanswerable,
            Err(Unserved::Asked(error)) => {
                self.outbound.metrics.http_error(Direction::Outbound, "bad_request");
                return error.render(shape);
            }
        };
        let error = answer::of_failure(&failed);
        if let Some(meter) = meter {
            // A failure whatever the status that tells of it.
            let status = error.status.as_u16();
            meter.response(Outcome { status, grpc_status: None, broken: true });
        }
        match failed {
            Failed::Send(SendErrorKind::Reset(reset)) if version == Version::HTTP_2 => abort(reset),
            failed => {
                self.outbound.metrics.http_error(Direction::Outbound, answer::label(&failed));
                error.render(shape)
            }
        }
    }
}

/// Whether nobody has acted upon the request.
fn is_unprocessed(failed: &Failed) -> bool {
    is_refused(failed) || matches!(failed, Failed::Send(SendErrorKind::NotProcessed(_)))
}

/// Whether the endpoint refused a connection. One that is full has not, and the request has waited
/// there for as long as is good for it.
fn is_refused(failed: &Failed) -> bool {
    matches!(failed, Failed::Connect(refusal) if !matches!(**refusal, Refusal::Overloaded(_)))
}

/// What a peer's proxy says of a request that it answered itself.
fn word_of_the_peer<B>(response: &Response<B>) -> Option<Refusal> {
    let said = response.headers().get(L5D_PROXY_ERROR)?.to_str().ok()?;
    let code = said.split(' ').next()?.parse().ok()?;
    Some(Refusal::Peer { code, said: said.chars().take(SAID_CHARS_MAX).collect() })
}

/// The destination that a request to an HTTP proxy names: its absolute form, else its Host.
fn destination<B>(request: &Request<B>) -> Result<Target, ProxyError> {
    if request.uri().scheme().is_some_and(|scheme| *scheme != Scheme::HTTP) {
        let problem = "this proxy sends what it is given as http; for https ask for a tunnel \
                       (CONNECT host:443)";
        return Err(ProxyError::new(StatusCode::BAD_REQUEST, GrpcStatus::Internal, problem));
    }
    let named = match request.uri().authority() {
        Some(authority) => Some(authority.as_str()),
        None => request.headers().get(HOST).and_then(|host| host.to_str().ok()),
    };
    let problem = match named {
        Some(named) => match Target::parse(named, HTTP_PORT) {
            Ok(target) => return Ok(target),
            Err(error) => format!("the destination {named:?} cannot be used: {error}"),
        },
        None => "the request names no destination: it needs a Host or an absolute URI".to_owned(),
    };
    Err(ProxyError::new(StatusCode::BAD_REQUEST, GrpcStatus::Internal, problem))
}

/// A request of HTTP/1 in absolute form is for the proxy; the server gets origin form, with the
/// Host that the URI names (RFC 9112 §3.2.2).
fn to_origin_form<B>(request: &mut Request<B>) {
    if request.version() == Version::HTTP_2 {
        return;
    }
    let Some(authority) = request.uri().authority() else { return };
    if let Ok(host) = HeaderValue::from_str(authority.as_str()) {
        request.headers_mut().insert(HOST, host);
    }
    let path = request.uri().path_and_query().cloned();
    *request.uri_mut() = path.unwrap_or(PathAndQuery::from_static("/")).into();
}

/// What discovery says instead of what the client said.
fn override_authority<B>(request: &mut Request<B>, authority: &str) {
    if let Ok(host) = HeaderValue::from_str(authority)
        && request.version() != Version::HTTP_2
    {
        request.headers_mut().insert(HOST, host);
    }
    if request.uri().authority().is_some() {
        let mut parts = request.uri().clone().into_parts();
        parts.authority = authority.parse().ok().or(parts.authority);
        if let Ok(uri) = Uri::from_parts(parts) {
            *request.uri_mut() = uri;
        }
    }
}

/// The request counts as pending at its endpoint until its response has ended.
fn holding(response: Response<Body>, chosen: Chosen) -> Response<Body> {
    response.map(|body| body.observed(Holding { _chosen: chosen }))
}

struct Holding {
    _chosen: Chosen,
}

impl Observer for Holding {
    fn frame(&mut self, _: &Frame) {}

    fn ended(&mut self, _: End<'_>) {}
}

const HTTP_PORT: u16 = 80;
/// Of what a peer says, in a line of the log.
const SAID_CHARS_MAX: usize = 512;

#[cfg(test)]
mod tests {
    use steadfast_api::Code;

    use super::*;

    fn request(target: &str, host: Option<&str>) -> Request<()> {
        let mut request = Request::builder().uri(target);
        if let Some(host) = host {
            request = request.header(HOST, host);
        }
        request.body(()).unwrap()
    }

    #[test]
    fn a_request_names_its_destination_by_uri_before_host() {
        let named = |target, host| destination(&request(target, host)).map(|t| t.to_string());
        assert_eq!(named("/a", Some("web.demo")).unwrap(), "web.demo:80");
        assert_eq!(named("http://api:8080/a", Some("web")).unwrap(), "api:8080");
        assert_eq!(named("/a", None).unwrap_err().status, StatusCode::BAD_REQUEST);
        assert_eq!(named("/a", Some("we b")).unwrap_err().status, StatusCode::BAD_REQUEST);
    }

    #[test]
    fn https_in_absolute_form_is_never_sent_in_plaintext() {
        let refused = destination(&request("https://api/a", None)).unwrap_err();
        assert_eq!(refused.status, StatusCode::BAD_REQUEST);
        assert!(refused.message.contains("CONNECT"), "{}", refused.message);
    }

    #[test]
    fn what_a_peers_proxy_answers_has_its_code() {
        let said = |said: &str| {
            let response = Response::builder().header(L5D_PROXY_ERROR, said).body(()).unwrap();
            word_of_the_peer(&response).and_then(|refusal| refusal.code())
        };
        assert_eq!(said("SFT-NET-002 port_undeclared: 81"), Some(Code::PORT_UNDECLARED));
        assert_eq!(said("the connection broke"), None);
        assert!(word_of_the_peer(&Response::new(())).is_none());
    }

    #[test]
    fn an_endpoint_that_is_full_is_not_taken_for_one_that_is_down() {
        let failed = |refusal| Failed::Connect(Rc::new(refusal));
        let full = failed(Refusal::Overloaded("full"));
        assert!(!is_refused(&full) && !is_unprocessed(&full));
        let source = io::ErrorKind::ConnectionRefused.into();
        let addr = SocketAddr::from(([10, 0, 0, 7], 80));
        let down = failed(Refusal::Unreachable { addr, source });
        assert!(is_refused(&down) && is_unprocessed(&down));
    }

    #[test]
    fn absolute_form_becomes_origin_form_with_the_host_of_the_uri() {
        let mut absolute = request("http://api:8080/a?b=c", Some("evil"));
        to_origin_form(&mut absolute);
        assert_eq!(absolute.uri(), "/a?b=c");
        assert_eq!(absolute.headers()[HOST], "api:8080");
    }
}
