//! The story of one request from a peer.

use std::rc::Rc;
use std::sync::Arc;

use http::header::HeaderName;
use http::{HeaderValue, Request, Response, Version};
use steadfast_policy::Policy;

use super::Inbound;
use super::facts::Facts;
use crate::answer;
use crate::connect::{Failed, Unanswered};
use crate::discovery::{Endpoint, ProtocolHint};
use crate::http::error::L5D_PROXY_ERROR;
use crate::http::{
    Body, Exchange, SendErrorKind, Shape, abort, begins_tunnel, needs_own_connection, orig_proto,
};
use crate::metrics::{Authz, Counter, Direction, HttpMeter, Labels};
use crate::refusal::Refusal;

/// Serves the requests of one connection.
pub(super) struct Serving {
    inbound: Rc<Inbound>,
    facts: Rc<Facts>,
    /// The verified peer's name, as applications are told it.
    client_id: Option<HeaderValue>,
    meter: Rc<HttpMeter>,
    /// The application, as an endpoint of HTTP/2.
    application: Arc<Endpoint>,
    server_labels: Labels,
    /// Counts requests that may; `None` if they could not when the connection was made.
    allowed: Option<Arc<Counter>>,
}

impl Serving {
    pub(super) fn new(inbound: Rc<Inbound>, facts: Rc<Facts>) -> Self {
        let dns = facts.peer.as_ref().and_then(|peer| peer.dns.as_ref());
        let policy = inbound.policies.for_port(facts.target.port());
        let permit = inbound.judge(&facts, &policy).ok();
        let allowed = permit.map(|permit| {
            let labels = facts.authz_labels(&policy, Some(&permit));
            inbound.metrics.decisions(Authz::HttpAllow, &labels)
        });
        Self {
            client_id: dns.and_then(|dns| HeaderValue::from_str(&dns.to_string()).ok()),
            meter: Rc::new(inbound.metrics.http(facts.labels())),
            application: Arc::new(Endpoint {
                addr: facts.target,
                weight: 1,
                identity: None,
                inbound_port: None,
                protocol: ProtocolHint::Http2,
                authority_override: None,
                labels: Arc::default(),
            }),
            server_labels: facts.server_labels(),
            allowed,
            inbound,
            facts,
        }
    }

    /// Judged again with each request: the policy may have changed since the connection was made.
    fn authorize(&self) -> Result<(), Refusal> {
        let policy: Arc<Policy> = self.inbound.policies.for_port(self.facts.target.port());
        match self.inbound.judge(&self.facts, &policy) {
            Ok(permit) => {
                let look_up = || {
                    let labels = self.facts.authz_labels(&policy, Some(&permit));
                    self.inbound.metrics.decisions(Authz::HttpAllow, &labels)
                };
                self.allowed.clone().unwrap_or_else(look_up).add(1);
                Ok(())
            }
            Err(refusal) => {
                let labels = self.facts.authz_labels(&policy, None);
                self.inbound.metrics.authorized(Authz::HttpDeny, &labels);
                let now = self.inbound.clock.since_boot();
                let (reporter, client) = (&self.inbound.reporter, self.facts.client);
                reporter.report(now, Direction::Inbound, client, &refusal);
                Err(refusal)
            }
        }
    }

    /// Turns a sidecar's request into what its client sent; says whether it had been HTTP/1.
    fn restore(&self, request: &mut Request<Body>) -> bool {
        // Whoever is not verified could name anyone.
        request.headers_mut().remove(L5D_CLIENT_ID);
        if let Some(client_id) = &self.client_id {
            request.headers_mut().insert(L5D_CLIENT_ID, client_id.clone());
        }
        if self.facts.peer.is_none() {
            orig_proto::strip(request.headers_mut());
            return false;
        }
        request.version() == Version::HTTP_2 && orig_proto::request_from_http2(request)
    }

    async fn send(&self, request: Request<Body>) -> Result<Response<Body>, Unanswered> {
        let (connect, target) = (&self.inbound.connect, self.facts.target);
        if request.version() == Version::HTTP_2 {
            let labels = || self.server_labels.clone();
            let direction = Direction::Inbound;
            return connect.send_http2(direction, &self.application, labels, request).await;
        }
        if needs_own_connection(&request) {
            return match connect.plaintext(target, self.server_labels.clone()).await {
                Ok(server) => connect.send_alone(Direction::Inbound, target, server, request).await,
                Err(refusal) => {
                    connect.report(Direction::Inbound, target, &refusal);
                    let failed = Failed::Connect(Rc::new(refusal));
                    Err(Unanswered { failed, request: Some(Box::new(request)) })
                }
            };
        }
        let labels = self.server_labels.clone();
        connect.send_http1(Direction::Inbound, target, labels, request).await
    }

    /// A request that the application's old connection did not take goes on a fresh one.
    async fn send_safely(&self, request: Request<Body>) -> Result<Response<Body>, Failed> {
        match self.send(request).await {
            Err(Unanswered {
                failed: Failed::Send(SendErrorKind::NotProcessed(_)),
                request: Some(again),
            }) => {
                self.inbound.metrics.retried(Direction::Inbound, "not_processed");
                self.send(*again).await.map_err(|unanswered| unanswered.failed)
            }
            result => result.map_err(|unanswered| unanswered.failed),
        }
    }
}

impl Exchange for Serving {
    async fn exchange(&self, mut request: Request<Body>) -> Response<Body> {
        let (shape, http2) = (Shape::of(&request), request.version() == Version::HTTP_2);
        let started = self.inbound.clock.since_boot();
        self.meter.request();
        let was_http1 = self.restore(&mut request);
        let method = request.method().clone();
        let answered = match self.authorize() {
            Ok(()) => Box::pin(self.send_safely(request)).await,
            Err(refusal) => Err(Failed::Connect(Rc::new(refusal))),
        };
        let elapsed = self.inbound.clock.since_boot().saturating_sub(started);
        self.meter.latency(elapsed);
        let mut response = match answered {
            Ok(mut response) => {
                orig_proto::strip(response.headers_mut());
                // The client's sidecar takes this for our own word.
                if self.facts.peer.is_some() {
                    response.headers_mut().remove(L5D_PROXY_ERROR);
                }
                if begins_tunnel(&method, &response) {
                    response = self.inbound.ages.tunnel(&self.facts.bounds, response);
                }
                response
            }
            Err(Failed::Send(SendErrorKind::Reset(reset))) if http2 && !was_http1 => {
                return abort(reset);
            }
            Err(failed) => {
                self.inbound.metrics.http_error(Direction::Inbound, answer::label(&failed));
                answer::of_failure(&failed).render(shape)
            }
        };
        if was_http1 {
            orig_proto::response_to_http2(&mut response);
        }
        answer::counted(response, self.meter.clone())
    }
}

/// The verified peer's DNS identity, for the application.
const L5D_CLIENT_ID: HeaderName = HeaderName::from_static("l5d-client-id");
