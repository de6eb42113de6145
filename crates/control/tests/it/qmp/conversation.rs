//! Whole conversations with a [`Session`]: what goes in and the exact text that
//! comes out. The expected texts are those of QEMU's daemon 10.0.2, except
//! where a comment says otherwise.

use dolmen_qmp::{QmpError, Session, Step, Version, json, reply_error, reply_ok};
use dolmen_types::{Actions, Conflict, Error, ErrorKind, Party, Value};
use serde_json::json;

use super::schema;

/// Feeds a client's bytes and renders every step; executed commands show their
/// name and arguments.
fn talk(session: &mut Session, input: &str) -> Vec<String> {
    let schema = schema();
    let mut out = Vec::new();
    let mut rest = input.as_bytes();
    loop {
        let n = session.feed(rest);
        rest = &rest[n..];
        while let Some(step) = session.next_step(&schema) {
            out.push(match step {
                Step::Reply(r) => json::to_text(&r, false),
                Step::Execute(r) => format!("{} {} {:?}", r.name, r.arguments, r.id),
            });
        }
        if rest.is_empty() {
            return out;
        }
    }
}

fn ready() -> Session {
    let mut s = Session::new(Version::current());
    assert_eq!(talk(&mut s, "{\"execute\":\"qmp_capabilities\"}"), ["{\"return\": {}}"]);
    s
}

fn error(input: &str) -> String {
    let mut replies = talk(&mut ready(), input);
    assert_eq!(replies.len(), 1, "{input}");
    let v: serde_json::Value = serde_json::from_str(&replies.remove(0)).expect("a reply");
    v["error"]["desc"].as_str().expect("an error").to_owned()
}

#[test]
fn negotiation() {
    let mut s = Session::new(Version::current());
    let greeting = s.greeting();
    assert_eq!(greeting["QMP"]["version"]["qemu"], json!({"major": 10, "minor": 0, "micro": 2}));
    assert_eq!(greeting["QMP"]["capabilities"], json!([]));
    assert!(!s.is_negotiated());
    assert_eq!(
        talk(&mut s, "{\"execute\":\"query-version\"}"),
        [
            r#"{"error": {"class": "CommandNotFound", "desc": "Expecting capabilities negotiation with 'qmp_capabilities'"}}"#
        ]
    );
    // Out-of-band execution is not offered, so asking for it is an error.
    assert_eq!(
        talk(&mut s, r#"{"execute":"qmp_capabilities","arguments":{"enable":["oob"]}}"#),
        [r#"{"error": {"class": "GenericError", "desc": "Capability oob not available"}}"#]
    );
    assert!(!s.is_negotiated());
    assert_eq!(talk(&mut s, r#"{"execute":"qmp_capabilities","id":1}"#), [r#"{"return": {}, "id": 1}"#]);
    assert!(s.is_negotiated());
    assert_eq!(
        talk(&mut s, "{\"execute\":\"qmp_capabilities\"}"),
        [
            r#"{"error": {"class": "CommandNotFound", "desc": "Capabilities negotiation is already complete, command ignored"}}"#
        ]
    );
}

#[test]
fn several_commands_in_one_packet_keep_their_order() {
    let out = talk(
        &mut ready(),
        "{\"execute\":\"query-version\",\"id\":{\"a\":[1,2.5,null]}}{\"execute\":\"foo\",\"id\":3}\n\n{'execute':'quit'}",
    );
    assert_eq!(
        out,
        [
            "query-version {} Some(Object {\"a\": Array [Number(1), Number(2.5), Null]})",
            r#"{"id": 3, "error": {"class": "CommandNotFound", "desc": "The command foo has not been found"}}"#,
            "quit {} None",
        ]
    );
}

#[test]
fn malformed_commands() {
    for (input, desc) in [
        (r#"{"execute":"query-version","arguments":5}"#, "QMP input member 'arguments' must be an object"),
        (r#"{"execute":"query-version","arguments":null}"#, "QMP input member 'arguments' must be an object"),
        (r#"{"execute":5}"#, "QMP input member 'execute' must be a string"),
        (r#"{"exec":"x"}"#, "QMP input member 'exec' is unexpected"),
        ("{}", "QMP input lacks member 'execute'"),
        ("[]", "QMP input must be a JSON object"),
        (r#""abc""#, "QMP input must be a JSON object"),
        (r#"{"execute":"query-version","foo":1}"#, "QMP input member 'foo' is unexpected"),
        (r#"{"execute":"query-version","arguments":{"a":1}}"#, "Parameter 'a' is unexpected"),
        (
            r#"{"execute":"query-version","exec-oob":"query-version"}"#,
            "QMP input member 'exec-oob' is unexpected",
        ),
        (r#"{"execute":"query-version","execute":"quit"}"#, "JSON parse error, duplicate key"),
        ("}", "JSON parse error, expecting value"),
    ] {
        assert_eq!(error(input), desc, "{input}");
    }
}

#[test]
fn wrong_arguments() {
    for (arguments, desc) in [
        ("{}", "Parameter 'driver' is missing"),
        (r#"{"driver":"bogus"}"#, "Parameter 'driver' does not accept value 'bogus'"),
        (r#"{"driver":3}"#, "Invalid parameter type for 'driver', expected: string"),
        (r#"{"driver":"null-co","size":"x"}"#, "Invalid parameter type for 'size', expected: integer"),
        (r#"{"driver":"null-co","size":1.5}"#, "Invalid parameter type for 'size', expected: integer"),
        (r#"{"driver":"null-co","zork":1}"#, "Parameter 'zork' is unexpected"),
        (
            r#"{"driver":"null-co","read-only":"on"}"#,
            "Invalid parameter type for 'read-only', expected: boolean",
        ),
        (r#"{"driver":"raw"}"#, "Parameter 'file' is missing"),
        (r#"{"driver":"raw","file":3}"#, "Invalid parameter type for 'file', expected: BlockdevRef"),
        (r#"{"driver":"raw","file":null}"#, "Invalid parameter type for 'file', expected: BlockdevRef"),
        (r#"{"driver":"raw","file":{}}"#, "Parameter 'file.driver' is missing"),
        (r#"{"driver":"raw","file":{"driver":"file"}}"#, "Parameter 'file.filename' is missing"),
        (
            r#"{"driver":"raw","file":{"driver":"file","filename":"x","locking":"x"}}"#,
            "Parameter 'locking' does not accept value 'x'",
        ),
        (
            r#"{"driver":"raw","file":{"driver":"file","filename":"x","cache":{"direct":1}}}"#,
            "Invalid parameter type for 'file.cache.direct', expected: boolean",
        ),
        (
            r#"{"driver":"raw","file":{"driver":"file","filename":"x","cache":{"x":1}}}"#,
            "Parameter 'file.cache.x' is unexpected",
        ),
        (
            r#"{"driver":"blkdebug","image":"n","inject-error":[{"event":"pwritev","zz":1}]}"#,
            "Parameter 'inject-error[0].zz' is unexpected",
        ),
        (
            r#"{"driver":"blkdebug","image":"n","inject-error":[{"event":"x"}]}"#,
            "Parameter 'event' does not accept value 'x'",
        ),
        (
            r#"{"driver":"blkdebug","image":"n","inject-error":[{}]}"#,
            "Parameter 'inject-error[0].event' is missing",
        ),
        (
            r#"{"driver":"blkdebug","image":"n","inject-error":5}"#,
            "Invalid parameter type for 'inject-error', expected: array",
        ),
        (
            r#"{"driver":"blkdebug","image":"n","inject-error":[5]}"#,
            "Invalid parameter type for 'inject-error[0]', expected: object",
        ),
    ] {
        let input = format!("{{\"execute\":\"blockdev-add\",\"arguments\":{arguments}}}");
        let said = error(&input);
        // What QEMU says, and then the values that would do.
        let (said, accepted) = said.split_once(" (use one of: ").unwrap_or((&said, ""));
        assert_eq!(said, desc, "{input}");
        assert_eq!(!accepted.is_empty(), desc.contains("does not accept value"), "{input}: {accepted}");
    }
}

#[test]
fn arguments_come_out_typed() {
    let out = talk(
        &mut ready(),
        r#"{"execute":"blockdev-add","arguments":{"driver":"qcow2","backing":null,"file":{"driver":"file","filename":"x"}}}"#,
    );
    assert_eq!(
        out,
        [
            r#"blockdev-add {"driver": "qcow2", "file": {"driver": "file", "filename": "x"}, "backing": null} None"#
        ]
    );
}

#[test]
fn a_bad_value_costs_only_itself() {
    let out = talk(&mut ready(), "{\"execute\":\"quit\"} xxx {\"a\":@} {\"execute\":\"quit\"}");
    assert_eq!(out.len(), 4, "{out:?}");
    assert_eq!(out[0], "quit {} None");
    assert!(out[1].contains("JSON parse error"), "{out:?}");
    assert!(out[2].contains("JSON parse error"), "{out:?}");
    assert_eq!(out[3], "quit {} None");
}

#[test]
fn replies() {
    let id = json!("x");
    assert_eq!(json::to_text(&reply_ok(json!([]), Some(&id)), false), r#"{"return": [], "id": "x"}"#);
    let e = QmpError::generic("no");
    assert_eq!(
        json::to_text(&reply_error(&e, None), false),
        r#"{"error": {"class": "GenericError", "desc": "no"}}"#
    );
}

/// The four parts of a refusal travel as data too, beyond QEMU's daemon.
#[test]
fn a_refusal_carries_its_parties() {
    let conflict = Conflict {
        node: "base".into(),
        actions: Actions::V,
        asks: Party {
            id: "e".into(),
            kind: "export".into(),
            detail: "nbd, writable".into(),
            since_secs: None,
            needs: Actions::D | Actions::V,
            allows: Actions::EVERY,
        },
        denies: Party {
            id: "top".into(),
            kind: "node".into(),
            detail: String::new(),
            since_secs: Some(3),
            needs: Actions::D,
            allows: Actions::D | Actions::M,
        },
        why: "reads it as its backing file".into(),
        remedies: vec!["Export 'base' read-only".into()],
    };
    let e = QmpError::from(Error::refused(conflict));
    let data = e.data.expect("data");
    assert_eq!(data["kind"], "Conflict");
    assert_eq!(data["conflict"]["node"], "base");
    assert_eq!(data["conflict"]["actions"], json!(["write"]));
    assert_eq!(data["conflict"]["denies"]["since-seconds"], 3);
    assert_eq!(data["conflict"]["denies"]["allows"], json!(["consistent-read", "write-unchanged"]));
    assert_eq!(data["conflict"]["remedies"], json!(["Export 'base' read-only"]));
    assert!(e.desc.contains("export 'e'") && e.desc.contains("Export 'base' read-only"), "{}", e.desc);

    let e = QmpError::from(Error::new(ErrorKind::NotFound, "no node 'x'").remedy("add it first"));
    assert_eq!(e.desc, "no node 'x' (add it first)");
}

/// A long definition passes; one beyond the limit is refused without harm to the connection.
#[test]
fn nesting_is_bounded() {
    let nested = |n: usize| {
        let mut v = Value::Str("bottom".into());
        for _ in 0..n {
            v = Value::Map(vec![("driver".into(), "raw".into()), ("file".into(), v)]);
        }
        format!("{{\"execute\":\"blockdev-add\",\"arguments\":{v}}}")
    };
    let mut s = ready();
    assert!(talk(&mut s, &nested(200))[0].starts_with("blockdev-add "));
    assert!(talk(&mut s, &nested(300))[0].contains("nesting depth limit"));
    assert_eq!(talk(&mut s, "{\"execute\":\"quit\"}"), ["quit {} None"]);
}
