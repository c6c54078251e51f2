"""The schemas of request and state are those of the script."""
import json
import sys

import pytest
import virt_v2v_wrapper as script

from schemas import VALIDATORS, schema

REQUEST, STATE = schema('request'), schema('state')
# Each part of the request's schema, and the rules of the script for the same keys.
PARTS = dict(script._SOURCE_KEYS, **script._TARGET_KEYS)
PARTS = [('request', REQUEST, script._COMMON)] + [
    (name, REQUEST['$defs'][name], PARTS[name]) for name in PARTS]


def test_all_but_the_oldest_python_can_tell_what_is_valid():
    assert bool(VALIDATORS) == (sys.version_info >= (3, 7))


@pytest.mark.skipif(not VALIDATORS, reason='needs jsonschema 4')
@pytest.mark.parametrize('name', ['request', 'state'])
def test_a_schema_is_valid_itself(name):
    VALIDATORS[name].check_schema(schema(name))


def objects(value):
    """Return all objects with properties in a schema."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return ([value] if isinstance(value, dict) and 'properties' in value else []) + [
        found for item in inner for found in objects(item)]


# --- the request -------------------------------------------------------------------------

@pytest.mark.parametrize('part, rules', [part[1:] for part in PARTS], ids=[p[0] for p in PARTS])
def test_a_part_of_the_request_has_the_keys_of_the_script(part, rules):
    assert list(part['properties']) == [rule.key for rule in rules]


@pytest.mark.parametrize('part, rules', [part[1:] for part in PARTS], ids=[p[0] for p in PARTS])
def test_a_part_of_the_request_says_what_is_needed(part, rules):
    assert part['required'] == [rule.key for rule in rules if rule.default is script._MANDATORY
                                and rule.key not in script._INSTEAD]


@pytest.mark.parametrize('part, rules', [part[1:] for part in PARTS], ids=[p[0] for p in PARTS])
def test_a_part_of_the_request_has_the_defaults(part, rules):
    defaults = {key: value['default'] for key, value in part['properties'].items()
                if 'default' in value}
    assert defaults == {rule.key: json.loads(json.dumps(rule.default)) for rule in rules
                        if rule.default is not script._MANDATORY}


@pytest.mark.parametrize('part', [part[1] for part in PARTS], ids=[part[0] for part in PARTS])
def test_each_key_of_a_request_is_described(part):
    assert [key for key, value in part['properties'].items() if 'description' not in value] == []


def test_the_request_has_the_limits_and_choices_of_the_script():
    assert REQUEST['$defs']['text']['maxLength'] == script.MAX_TEXT
    assert REQUEST['properties']['transport_method']['enum'] == list(script._SOURCE_KEYS)


# --- the state ---------------------------------------------------------------------------

def test_each_key_of_a_state_is_described():
    assert [key for key, value in STATE['properties'].items() if 'description' not in value] == []


def test_a_key_of_a_state_has_to_be_in_the_schema():
    whole = [value for value in objects([STATE['properties'], STATE['$defs']])] + [STATE]
    assert [value for value in whole if value.get('additionalProperties') is not False] == []


def test_the_state_has_the_codes_and_limits_of_the_script():
    codes = list(dict.fromkeys([code for _, code, _ in script._CAUSES] + ['unknown']))
    assert STATE['properties']['last_message']['properties']['code']['enum'] == codes
    assert STATE['properties']['warnings']['maxItems'] == script.MAX_WARNINGS
