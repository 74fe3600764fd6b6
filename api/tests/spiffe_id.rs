//! The rules of the SPIFFE-ID standard, §2, and of the names that Kubernetes and Linkerd give, as
//! tables of what is accepted and what is refused, and why.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]

use proptest::prelude::*;
use steadfast_api::spiffe::Reason;
use steadfast_api::{DnsIdentity, SpiffeId, TrustDomain};

fn long(prefix: &str, bytes: usize) -> String {
    format!("{prefix}{}", "a".repeat(bytes - prefix.len()))
}

#[test]
fn accepted_ids() {
    for (id, trust_domain, path) in [
        ("spiffe://cluster.local/ns/demo/sa/web", "cluster.local", "/ns/demo/sa/web"),
        ("spiffe://cluster.local", "cluster.local", ""),
        ("spiffe://a/b", "a", "/b"),
        ("spiffe://a_b-c.0/B", "a_b-c.0", "/B"),
        ("spiffe://td/a.b", "td", "/a.b"),
        ("spiffe://td/...", "td", "/..."),
        ("spiffe://td/.a/..b/c..", "td", "/.a/..b/c.."),
        ("spiffe://td/-_.", "td", "/-_."),
        ("spiffe://1.2.3.4/x", "1.2.3.4", "/x"),
        ("spiffe://-/x", "-", "/x"),
        ("spiffe://spiffe/spiffe", "spiffe", "/spiffe"),
    ] {
        let parsed: SpiffeId = id.parse().unwrap_or_else(|error| panic!("{id}: {error}"));
        assert_eq!((parsed.trust_domain_name(), parsed.path()), (trust_domain, path));
        assert_eq!(parsed.to_string(), id);
        assert!(parsed.is_member_of(&trust_domain.parse().unwrap()));
    }
}

#[test]
fn refused_ids() {
    let path = |c| Reason::Character(c, "a-z, A-Z, 0-9, \".\", \"-\" and \"_\"");
    let name = |c| Reason::Character(c, "a-z, 0-9, \".\", \"-\" and \"_\"");
    for (id, reason) in [
        ("", Reason::Empty),
        ("spiffe:", Reason::Scheme),
        ("spiffe:/td/a", Reason::Scheme),
        ("SPIFFE://td/a", Reason::Scheme),
        ("Spiffe://td/a", Reason::Scheme),
        ("https://td/a", Reason::Scheme),
        (" spiffe://td/a", Reason::Scheme),
        ("td/a", Reason::Scheme),
        ("spiffe://", Reason::NoTrustDomain),
        ("spiffe:///a", Reason::NoTrustDomain),
        // Case, and what else a URI's authority could hold.
        ("spiffe://TD/a", name('T')),
        ("spiffe://td:8080/a", name(':')),
        ("spiffe://user@td/a", name('@')),
        ("spiffe://user:password@td/a", name(':')),
        ("spiffe://[::1]/a", name('[')),
        ("spiffe://t d/a", name(' ')),
        ("spiffe://t%64/a", name('%')),
        ("spiffe://dömäne/a", name('ö')),
        ("spiffe://td?query", name('?')),
        ("spiffe://td#fragment", name('#')),
        ("spiffe://td\\a", name('\\')),
        ("spiffe://td\0", name('\0')),
        // Segments.
        ("spiffe://td/", Reason::EmptySegment),
        ("spiffe://td/a/", Reason::EmptySegment),
        ("spiffe://td//a", Reason::EmptySegment),
        ("spiffe://td/a//b", Reason::EmptySegment),
        ("spiffe://td/.", Reason::DotSegment),
        ("spiffe://td/..", Reason::DotSegment),
        ("spiffe://td/a/./b", Reason::DotSegment),
        ("spiffe://td/a/../b", Reason::DotSegment),
        ("spiffe://td/a/..", Reason::DotSegment),
        // Percent-encoding, query, fragment and all else.
        ("spiffe://td/a%2fb", path('%')),
        ("spiffe://td/%61", path('%')),
        ("spiffe://td/a?b", path('?')),
        ("spiffe://td/a#b", path('#')),
        ("spiffe://td/a b", path(' ')),
        ("spiffe://td/a\n", path('\n')),
        ("spiffe://td/a\0", path('\0')),
        ("spiffe://td/a:b", path(':')),
        ("spiffe://td/a@b", path('@')),
        ("spiffe://td/a+b", path('+')),
        ("spiffe://td/a~b", path('~')),
        ("spiffe://td/ä", path('ä')),
    ] {
        let error = id.parse::<SpiffeId>().expect_err(id);
        assert_eq!(error.reason(), reason, "{id:?}");
    }
}

#[test]
fn lengths_are_counted_in_bytes_to_the_last_one() {
    assert!(long("spiffe://td/", 2048).parse::<SpiffeId>().is_ok());
    let error = long("spiffe://td/", 2049).parse::<SpiffeId>().unwrap_err();
    assert_eq!(error.reason(), Reason::TooLong(2049, 2048));
    assert!(error.to_string().len() < 400, "an error shows the beginning: {error}");
    assert!(long("", 255).parse::<TrustDomain>().is_ok());
    let error = long("", 256).parse::<TrustDomain>().unwrap_err();
    assert_eq!(error.reason(), Reason::TooLong(256, 255));
    let id = format!("spiffe://{}/x", long("", 256));
    assert_eq!(id.parse::<SpiffeId>().unwrap_err().reason(), Reason::TooLong(256, 255));
    // Cut within a character, an error must not panic.
    let error = "ä".repeat(1500).parse::<SpiffeId>().unwrap_err();
    assert_eq!(error.reason(), Reason::TooLong(3000, 2048));
}

#[test]
fn a_service_account_is_read_from_one_form_of_path_only() {
    for (id, expected) in [
        ("spiffe://td/ns/demo/sa/web", Some(("demo", "web"))),
        ("spiffe://td/ns/demo/sa/web/x", None),
        ("spiffe://td/ns/demo/sa", None),
        ("spiffe://td/NS/demo/sa/web", None),
        ("spiffe://td/ns/demo/x/web", None),
        ("spiffe://td/x/ns/demo/sa/web", None),
        ("spiffe://td", None),
    ] {
        assert_eq!(id.parse::<SpiffeId>().unwrap().service_account(), expected, "{id}");
    }
}

#[test]
fn ids_of_service_accounts_hold_kubernetes_names_only() {
    let trust_domain: TrustDomain = "td".parse().unwrap();
    let id = |namespace: &str, name: &str| {
        SpiffeId::for_service_account(&trust_domain, namespace, name).map_err(|e| e.reason())
    };
    assert_eq!(id("demo", "web").unwrap().as_str(), "spiffe://td/ns/demo/sa/web");
    assert!(id("demo", "web.v1").is_ok(), "a service account is a DNS subdomain");
    let longest = "a".repeat(63);
    assert!(id(&longest, "web").is_ok());
    for (namespace, name) in [
        ("", "web"),
        ("demo", ""),
        ("de.mo", "web"),
        ("Demo", "web"),
        ("demo", "Web"),
        ("-demo", "web"),
        ("demo-", "web"),
        ("de_mo", "web"),
        ("demo", "web."),
        ("demo", ".web"),
        ("demo", "web..v1"),
        ("demo/sa/admin", "web"),
        ("demo", "../admin"),
        (&"a".repeat(64), "web"),
    ] {
        assert_eq!(id(namespace, name), Err(Reason::Label), "{namespace:?} {name:?}");
    }
    let name = vec!["a".repeat(63); 4].join(".");
    assert_eq!(id("demo", &name), Err(Reason::TooLong(255, 253)));
}

#[test]
fn dns_identities() {
    let text = "web.demo.serviceaccount.identity.steadfast.cluster.local";
    let identity: DnsIdentity = text.parse().unwrap();
    assert_eq!((identity.service_account(), identity.namespace()), ("web", "demo"));
    assert_eq!(identity.control_namespace(), "steadfast");
    assert_eq!(identity.trust_domain().as_str(), "cluster.local");
    assert_eq!(identity.spiffe_id().as_str(), "spiffe://cluster.local/ns/demo/sa/web");
    let dotted: DnsIdentity = "a.b.ns.serviceaccount.identity.c.td".parse().unwrap();
    assert_eq!((dotted.service_account(), dotted.namespace()), ("a.b", "ns"));

    for (text, reason) in [
        ("", Reason::Form),
        ("web.demo.cluster.local", Reason::Form),
        ("demo.serviceaccount.identity.steadfast.td", Reason::Form),
        ("web.demo.serviceaccount.identity.td", Reason::Form),
        ("web.demo.serviceaccount.identity.steadfast.", Reason::Empty),
        ("web.demo.serviceaccount.identity..td", Reason::Label),
        (".demo.serviceaccount.identity.steadfast.td", Reason::Label),
        ("web..serviceaccount.identity.steadfast.td", Reason::Label),
        ("web.demo.serviceaccount.identity.steadfast.td.", Reason::Label),
        ("web.demo.serviceaccount.identity.steadfast.t_d", Reason::Label),
        ("WEB.demo.serviceaccount.identity.steadfast.td", Reason::Label),
        ("web.demo.ServiceAccount.identity.steadfast.td", Reason::Form),
    ] {
        assert_eq!(text.parse::<DnsIdentity>().unwrap_err().reason(), reason, "{text:?}");
    }
    let long_td =
        format!("web.demo.serviceaccount.identity.steadfast.{}", vec!["a"; 110].join("."));
    let reason = long_td.parse::<DnsIdentity>().unwrap_err().reason();
    assert!(matches!(reason, Reason::TooLong(_, 253)), "{reason:?}");
}

/// Else a service account of one mesh could be named so that it reads as one of another.
#[test]
fn a_dns_identity_cannot_be_built_that_reads_as_another() {
    let trust_domain: TrustDomain = "td".parse().unwrap();
    for (service_account, namespace) in [
        ("a.b.serviceaccount.identity.c", "d"),
        ("x.serviceaccount.identity.y", "n"),
        ("x.serviceaccount", "identity"),
    ] {
        let identity = DnsIdentity::new(service_account, namespace, "steadfast", &trust_domain);
        assert_eq!(identity.unwrap_err().reason(), Reason::Infix, "{service_account} {namespace}");
    }
}

proptest! {
    #[test]
    fn what_parses_prints_as_it_was_written(text in any_id()) {
        if let Ok(id) = text.parse::<SpiffeId>() {
            prop_assert_eq!(id.to_string(), text);
            let json = serde_json::to_string(&id).unwrap();
            prop_assert_eq!(serde_json::from_str::<SpiffeId>(&json).unwrap(), id);
        }
    }

    #[test]
    fn what_prints_parses(segments in prop::collection::vec("[a-zA-Z0-9._-]{1,12}", 0..6)) {
        prop_assume!(segments.iter().all(|s| s != "." && s != ".."));
        let path: String = segments.iter().map(|segment| format!("/{segment}")).collect();
        let id: SpiffeId = format!("spiffe://td{path}").parse().unwrap();
        prop_assert_eq!(id.path(), path);
        prop_assert_eq!(id.to_string().parse(), Ok(id));
    }

    #[test]
    fn dns_identities_read_back(
        service_account in "[a-z](\\.?[a-z0-9]){0,8}|serviceaccount|a\\.serviceaccount\\.identity\\.b",
        namespace in "[a-z][a-z0-9]{0,8}|serviceaccount|identity",
        control in "[a-z]{1,8}|serviceaccount",
        trust_domain in "[a-z](\\.?[a-z0-9]){0,8}|identity\\.x|a\\.serviceaccount\\.identity\\.b",
    ) {
        let trust_domain: TrustDomain = trust_domain.parse().unwrap();
        if let Ok(identity) = DnsIdentity::new(&service_account, &namespace, &control, &trust_domain) {
            prop_assert_eq!(identity.spiffe_id().to_string().parse(), Ok(identity.spiffe_id()));
            prop_assert_eq!(identity.to_string().parse(), Ok(identity));
        }
    }

    #[test]
    fn any_text_is_an_id_or_a_short_error(text in ".*") {
        if let Err(error) = text.parse::<SpiffeId>() {
            prop_assert!(error.to_string().len() < 2048);
        }
        let _ = (text.parse::<TrustDomain>(), text.parse::<DnsIdentity>());
    }
}

/// Mostly near to an ID.
fn any_id() -> impl Strategy<Value = String> {
    prop_oneof![
        "spiffe://[a-z.]{0,8}(/[a-zA-Z0-9._%-]{0,4}){0,4}",
        "spiffe://[a-zA-Z0-9./:@?#%_-]{0,30}",
        "[a-z]{0,8}:?/{0,3}[a-z/]{0,10}",
    ]
}
